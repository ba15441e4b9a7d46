# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Epochs and unreadable images of unlabeled datasets."""

from contextlib import suppress
from pathlib import Path

import torch
from mmengine.dist import (
    all_reduce,
    barrier,
    get_rank,
    get_world_size,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmdensecl.datasets.draws import number_draws
from mmdensecl.datasets.unlabeled import unlabeled_parts
from mmdensecl.registry import HOOKS

from ..loader import sampler_of
from ..safe_write import write_safely


@HOOKS.register_module()
class UnlabeledDataHook(Hook):
    """Pass the epoch to the dataset, and report unreadable images.

    Their names are appended to `unreadable.txt` in the work_dir when they are
    met, by any rank. At the end of an epoch in which new ones were met, their
    number is logged, and the list is put into the order of the dataset. A run
    that resumes in the middle of an epoch tries those again that are named
    there, and so counts what it met before; other runs start a new list.

    Args:
        max_names: Names in the log line.

    Raises:
        ValueError: The ranks would get batches of different sizes.
    """

    def __init__(self, max_names: int = 5) -> None:
        self.max_names = max_names
        self.reported = 0

    def before_train(self, runner) -> None:
        """Number the draws; refuse what ranks cannot share."""
        loader = runner.train_dataloader
        number_draws(loader)
        parts = [*unlabeled_parts(loader.dataset)]
        # Else the ranks' exchanges could not meet.
        if get_world_size() > 1 and not getattr(
            sampler_of(loader), 'round_up', True
        ):
            raise ValueError(
                'The ranks exchange images, so their batches must be of one '
                'size: set train_dataloader.sampler.round_up=True'
            )
        # Also after a stop at an epoch's last iteration.
        in_epoch = runner.iter != runner.epoch * len(loader)
        if runner.iter == runner.max_iters and not in_epoch:
            return  # finished: the list is to stay
        path = self._list_of(runner)
        for part in parts:
            part.unreadable_file = str(path)
        if in_epoch:
            noted = path.read_bytes() if path.is_file() else b''
            text = noted.decode('utf-8', 'surrogateescape')
            names = {*text.split('\n')} - {''}
            rank, ranks = get_rank(), get_world_size()
            for part in parts if names else ():
                start, end = (len(part) * x // ranks for x in (rank, rank + 1))
                part.retry(names, range(start, end))
            self._sync_unreadable(runner)
        if not self.reported and is_main_process():
            with suppress(OSError):
                path.unlink()
        barrier()  # nobody appends to a list that is about to go

    def before_train_epoch(self, runner) -> None:
        """Pass on epoch and seed."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            return  # one endless epoch: its passes must not repeat each other
        parts = unlabeled_parts(runner.train_dataloader.dataset)
        for number, part in enumerate(parts):
            part.set_epoch(runner.epoch, runner.seed + 1_000_003 * number)

    def after_train_epoch(self, runner) -> None:
        """Report what could not be read, on any rank."""
        self._sync_unreadable(runner)

    def _sync_unreadable(self, runner) -> None:
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
        names = [*dict.fromkeys(names)]
        if len(names) > self.reported:
            self.reported = len(names)
            self._report(runner, names, total)
            barrier()  # what another rank appended meanwhile would be lost
        for part in unlabeled_parts(runner.train_dataloader.dataset):
            part.check_unreadable()

    @staticmethod
    def _list_of(runner) -> Path:
        return Path(runner.work_dir, 'unreadable.txt')

    def _report(self, runner, names: list[str], total: int) -> None:
        path = self._list_of(runner)
        # A name may hold line breaks, or what cannot be printed.
        shown = ', '.join(map(repr, names[: self.max_names]))
        more = len(names) - self.max_names
        runner.logger.warning(
            f'{len(names)} of {total} images could not be read and '
            f'were replaced by others: {shown}'
            f'{f" and {more} more" if more > 0 else ""}. All are named in '
            f'{path}'
        )
        if not is_main_process():
            return
        text = '\n'.join(names) + '\n'
        try:
            # A file's name may be no UTF-8.
            write_safely(path, text.encode('utf-8', 'surrogateescape'))
        except OSError as error:
            runner.logger.warning(
                f'"{path}" could not be written ({error.strerror}), so it '
                'does not name them all. The run continues'
            )
