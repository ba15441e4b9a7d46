# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Time until a folder of many pictures is ready, and what workers add."""
import gc
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median
from typing import Any, Tuple

import measure
from mmengine.dataset import BaseDataset

from mmdensecl.datasets import UnlabeledFolder, listing
from mmdensecl.datasets.listing import TICK, cache_file

WORKERS = 2
PEER = 'mmpretrain, CustomDataset'


def fill(root: Path, files: int, folders: int) -> None:
    """Make empty files, spread over folders."""
    for i in range(folders):
        folder = root / f'class_{i:05d}'
        folder.mkdir()
        for j in range(i, files, folders):
            (folder / f'picture_{j:08d}.jpg').touch()
    time.sleep(TICK + 1)  # what is younger is not remembered


def search(root: str) -> BaseDataset:
    cache_file(os.path.realpath(root)).unlink(missing_ok=True)
    return UnlabeledFolder(root)


def peer(root: str) -> BaseDataset:
    from mmpretrain.datasets import CustomDataset
    return CustomDataset(data_root=root, with_label=False)


# The second finds what the first has left.
RIVALS = {
    'mmdensecl, searched': search,
    'mmdensecl, remembered': UnlabeledFolder,
    PEER: peer,
}


def private_bytes() -> int:
    """Memory that this process shares with no other; on Linux."""
    text = Path('/proc/self/smaps_rollup').read_text(encoding='utf-8')
    lines = text.splitlines()
    return 1024 * sum(
        int(line.split()[1]) for line in lines if line.startswith('Private'))


def read_names(dataset: BaseDataset, growth: Any) -> None:
    """A worker, forked, which tells by how much its memory grows."""
    gc.disable()  # a collection writes to all that it inherited
    before = private_bytes()
    for i in range(len(dataset)):
        dataset.get_data_info(i)
    growth.put(private_bytes() - before)


def weigh(name: str, root: str) -> Tuple[int, int, int]:
    """Pictures, bytes sent to a spawned worker, growth of forked ones."""
    dataset = RIVALS[name](root)
    context = get_context('fork')
    growth = context.SimpleQueue()
    workers = [
        context.Process(target=read_names, args=(dataset, growth))
        for _ in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    grown = sum(growth.get() for _ in workers)
    for worker in workers:
        worker.join()
    return len(dataset), len(ForkingPickler.dumps(dataset)), grown


def main() -> None:
    parser = measure.make_parser(__doc__)
    parser.add_argument('--files', type=int, default=1_000_000)
    parser.add_argument('--folders', type=int, default=1000)
    args = measure.parse(parser)
    report = measure.Report(
        f'{args.files:,} pictures in {args.folders:,} folders that the system '
        f'has in memory; {WORKERS} forked workers that read all names', args)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, 'pictures')
        root.mkdir()
        os.environ['MMDENSECL_LISTINGS'] = str(Path(folder, 'listings'))
        listing.MIN_SECONDS = 0  # remember few files, too
        fill(root, args.files, args.folders)
        seconds = measure.take_turns(
            {
                name: lambda make=make: make(str(root))
                for name, make in RIVALS.items()
            }, args.rounds, args.device)
        assert cache_file(os.path.realpath(root)).exists()
        for name in RIVALS:
            # In a process of its own, without what the others left behind.
            with ProcessPoolExecutor(1, get_context('spawn')) as pool:
                count, sent, grown = pool.submit(weigh, name,
                                                 str(root)).result()
            report.add(
                name,
                pictures=count,
                seconds=median(seconds[name]),
                time_ratio=measure.ratio(seconds[name], seconds[PEER]),
                sent_to_spawned_MiB=sent / measure.MIB,
                added_by_forked_MiB=grown / measure.MIB)
    report.show()


if __name__ == '__main__':
    main()
