# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from pathlib import Path
from typing import Optional

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import Hook

from mmdensecl.datasets.unlabeled import UnlabeledDataset
from mmdensecl.registry import HOOKS


@HOOKS.register_module()
class UnlabeledDataHook(Hook):
    """Tell the data set the epoch, and the user of unreadable pictures.

    At the end of an epoch in which new ones were met, it logs how many there
    are and writes their names to ``unreadable.txt`` in the work_dir.

    Args:
        max_names (int): Names in the log line. Defaults to 5.

    Raises:
        ValueError: The ranks would get batches of different sizes.
    """

    def __init__(self, max_names: int = 5) -> None:
        self.max_names = max_names
        self.reported = 0

    @staticmethod
    def _dataset(runner) -> Optional[UnlabeledDataset]:
        dataset = runner.train_dataloader.dataset
        return dataset if isinstance(dataset, UnlabeledDataset) else None

    def before_train(self, runner) -> None:
        """Refuse a sampler under which the ranks' exchanges cannot meet."""
        sampler = runner.train_dataloader.sampler
        if get_world_size() > 1 and not getattr(sampler, 'round_up', True):
            raise ValueError(
                'The ranks swap pictures, so their batches must be of one '
                'size: set train_dataloader.sampler.round_up=True')

    def before_train_epoch(self, runner) -> None:
        """Pass on epoch and seed."""
        dataset = self._dataset(runner)
        if dataset is not None:
            dataset.set_epoch(runner.epoch, runner.seed)

    def after_train_epoch(self, runner) -> None:
        """Report what could not be read."""
        dataset = self._dataset(runner)
        if dataset is None:
            return
        broken = dataset.unreadable.clone().int()
        all_reduce(broken, op='max')
        broken = torch.nonzero(broken).flatten().tolist()
        if len(broken) <= self.reported:
            return
        self.reported = len(broken)
        names = [dataset.get_data_info(i)['img_path'] for i in broken]
        shown = ', '.join(names[:self.max_names])
        more = len(names) - self.max_names
        runner.logger.warning(
            f'{len(names)} of {len(dataset)} pictures could not be read and '
            f'were replaced by others: {shown}'
            f'{f" and {more} more" if more > 0 else ""}. All are named in '
            f'{Path(runner.work_dir, "unreadable.txt")}')
        if is_main_process():
            Path(runner.work_dir, 'unreadable.txt').write_text(
                '\n'.join(names) + '\n', encoding='utf-8')
