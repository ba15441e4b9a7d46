# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List

import torch
from mmengine.dist import (all_gather_object, all_reduce, barrier, get_rank,
                           get_world_size, is_main_process)
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmdensecl.datasets.unlabeled import UnlabeledDataset
from mmdensecl.registry import HOOKS
from ..safe_write import write_safely


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

    Their names are appended to ``unreadable.txt`` in the work_dir when they
    are met, by any rank. At the end of an epoch in which new ones were met,
    their number is logged, and the list is put into the order of the data
    set. A run that goes on in the middle of an epoch tries those again that
    are named there, and so counts what it met before; other runs start a new
    list.

    Args:
        max_names (int): Names in the log line. Defaults to 5.

    Raises:
        ValueError: The ranks would get batches of different sizes, or have
            different pictures.
    """

    def __init__(self, max_names: int = 5) -> None:
        self.max_names = max_names
        self.reported = 0

    def before_train(self, runner) -> None:
        """Refuse what ranks cannot share; take up the list of pictures."""
        loader = runner.train_dataloader
        parts = [*unlabeled_parts(loader.dataset)]
        if get_world_size() > 1:
            # Else their exchanges could not meet.
            if not getattr(loader.sampler, 'round_up', True):
                raise ValueError(
                    'The ranks swap pictures, so their batches must be of one '
                    'size: set train_dataloader.sampler.round_up=True')
            compare_lists(parts)
        # Also after a stop at an epoch's last iteration.
        in_epoch = runner.iter != runner.epoch * len(loader)
        if runner.iter == runner.max_iters and not in_epoch:
            return  # finished: the list is to stay
        path = self._list_of(runner)
        for part in parts:
            part.unreadable_file = str(path)
        if in_epoch:
            noted = path.read_bytes() if path.is_file() else b''
            names = {*noted.split(b'\n')} - {b''}
            for part in parts if names else ():
                part.try_again(names, get_rank(), get_world_size())
            self._take_stock(runner)
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
        self._take_stock(runner)

    def _take_stock(self, runner) -> None:
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
        if not is_main_process():
            return
        text = '\n'.join(names) + '\n'
        try:
            # A file's name may be no UTF-8.
            write_safely(path, text.encode('utf-8', 'surrogateescape'))
        except OSError as error:
            runner.logger.warning(
                f'"{path}" could not be written ({error.strerror}), so it '
                'does not name them all. The run goes on')


def compare_lists(parts: List[UnlabeledDataset]) -> None:
    """Refuse ranks that would draw from different pictures.

    Args:
        parts (List[UnlabeledDataset]): The data sets of this rank.

    Raises:
        ValueError: On all ranks, with the number of pictures of each.
    """
    mine = ' + '.join(f'{len(part):,} pictures (list {part.digest()[:8]})'
                      for part in parts)
    ranks: Dict[str, List[int]] = {}
    for rank, theirs in enumerate(all_gather_object(mine)):
        ranks.setdefault(theirs, []).append(rank)
    if len(ranks) > 1:
        found = '; '.join(f'{what} on rank {", ".join(map(str, where))}'
                          for what, where in ranks.items())
        raise ValueError(
            f'The ranks do not find the same pictures: {found}. Each would '
            'train on a share of another list. Let data_root hold the same '
            'files on all machines, none of which come or go while the run '
            'starts, and start it again')
