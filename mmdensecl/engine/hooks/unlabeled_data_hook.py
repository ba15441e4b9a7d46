# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from pathlib import Path
from typing import Any, Iterator, List

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmdensecl.datasets.unlabeled import UnlabeledDataset
from mmdensecl.registry import HOOKS


def unlabeled_parts(dataset: Any) -> Iterator[UnlabeledDataset]:
    """The data sets of ours inside wrappers such as ConcatDataset."""
    if isinstance(dataset, UnlabeledDataset):
        yield dataset
    for part in getattr(dataset, 'datasets', ()):
        yield from unlabeled_parts(part)
    if hasattr(dataset, 'dataset'):
        yield from unlabeled_parts(dataset.dataset)


@HOOKS.register_module()
class UnlabeledDataHook(Hook):
    """Tell the data set the epoch, and the user of unreadable pictures.

    At the end of an epoch in which new ones were met, it logs how many there
    are and writes their names to ``unreadable.txt`` in the work_dir. A run
    that goes on in the middle of an epoch keeps those that are named there,
    of which it may meet none in what is left of this epoch.

    Args:
        max_names (int): Names in the log line. Defaults to 5.

    Raises:
        ValueError: The ranks would get batches of different sizes.
    """

    def __init__(self, max_names: int = 5) -> None:
        self.max_names = max_names
        self.reported = 0
        self.earlier: List[str] = []

    def before_train(self, runner) -> None:
        """Refuse a sampler under which the ranks' exchanges cannot meet."""
        sampler = runner.train_dataloader.sampler
        if get_world_size() > 1 and not getattr(sampler, 'round_up', True):
            raise ValueError(
                'The ranks swap pictures, so their batches must be of one '
                'size: set train_dataloader.sampler.round_up=True')
        path = self._list_of(runner)
        in_epoch = runner.iter % len(runner.train_dataloader)
        if in_epoch and path.is_file():
            text = path.read_text(encoding='utf-8', errors='surrogateescape')
            self.earlier = text.split('\n')[:-1]

    def before_train_epoch(self, runner) -> None:
        """Pass on epoch and seed."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return  # one endless epoch: its passes must not repeat each other
        parts = unlabeled_parts(runner.train_dataloader.dataset)
        for number, part in enumerate(parts):
            part.set_epoch(runner.epoch, runner.seed + 1_000_003 * number)

    def after_train_epoch(self, runner) -> None:
        """Report what could not be read, on any rank."""
        names, total = [], 0
        for part in unlabeled_parts(runner.train_dataloader.dataset):
            broken = part.unreadable.byte()
            all_reduce(broken, op='max')
            part.unreadable |= broken.bool()
            total += len(part)
            names += [
                part.get_data_info(i)['img_path']
                for i in torch.nonzero(broken).flatten().tolist()
            ]
        names = [*dict.fromkeys([*self.earlier, *names])]
        self.earlier = []
        if len(names) > self.reported:
            self.reported = len(names)
            self._report(runner, names, total)
        for part in unlabeled_parts(runner.train_dataloader.dataset):
            part.check_unreadable()

    @staticmethod
    def _list_of(runner) -> Path:
        return Path(runner.work_dir, 'unreadable.txt')

    def _report(self, runner, names: List[str], total: int) -> None:
        path = self._list_of(runner)
        # A name may hold line breaks, or what cannot be printed.
        shown = ', '.join(map(repr, names[:self.max_names]))
        more = len(names) - self.max_names
        runner.logger.warning(
            f'{len(names)} of {total} pictures could not be read and '
            f'were replaced by others: {shown}'
            f'{f" and {more} more" if more > 0 else ""}. All are named in '
            f'{path}')
        if is_main_process():
            # A file's name may be no UTF-8.
            path.write_text(
                '\n'.join(names) + '\n',
                encoding='utf-8',
                errors='surrogateescape')
