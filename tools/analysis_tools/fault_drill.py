# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Hurt training runs in every way that is known, and count what is lost.

    python tools/analysis_tools/fault_drill.py

Each row of the table is a fault: how often it was injected, after how many of
these all was as it has to be, and how many lost something. Where a run is
interrupted, nothing is lost if it goes on by ``--resume`` to the very bits of
a run that was left in peace (see faults.py). Needs Linux with user
namespaces (``unshare``), and no GPU.
"""
import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen
from typing import Callable, Dict, Iterator, List

from faults import (BATCH, EPOCHS, PICTURES, Site, descendants, finite, kill,
                    newest, until, wait)
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmdensecl.testing import write_pictures

WITHIN = 60  # seconds in which the other processes of a dead one must end

# A fault gives True for each injection after which all was well.
Fault = Callable[[Site, int], Iterator[bool]]


def kill_anywhere(site: Site, count: int) -> Iterator[bool]:
    """SIGKILL at any moment"""

    def moment(process: Popen, work_dir: Path) -> None:
        time.sleep(site.random.uniform(0, site.seconds))

    return _kill_often(site, 'killed', count, moment)


def kill_in_save(site: Site, count: int) -> Iterator[bool]:
    """SIGKILL while a checkpoint is written"""

    def moment(process: Popen, work_dir: Path) -> None:
        saves, last = site.random.randint(1, 4), None

        def in_save() -> bool:
            nonlocal saves, last
            now = next(work_dir.glob('.iter_*.pth.saving'), None)
            saves -= now is not None and now != last
            last = now or last
            return saves == 0 and now is not None

        until(in_save, process)
        time.sleep(site.random.uniform(0, 0.005))

    return _kill_often(site, 'killed-in-save', count, moment)


def _kill_often(site: Site, name: str, count: int,
                moment: Callable[[Popen, Path], None]) -> Iterator[bool]:
    """Kill a run again and again until it ends; then the next.

    A run that ends by itself with an error has lost all that was done to it.
    """
    run = 0
    while count > 0:
        run, kills, crashed = run + 1, 0, False
        title = f'{name}-{run}'
        while kills < count:
            process = site.start(title)
            moment(process, site.folder / title)
            status = process.poll()
            kill(process)
            if status is not None:
                crashed = status != 0
                break
            kills += 1
        good = not crashed and site.finish(title) and site.same(title)
        injections = max(kills, int(crashed))
        count -= injections
        yield from [good] * injections


def terminate(site: Site, count: int, ranks: int = 1) -> Iterator[bool]:
    """SIGTERM in the middle of an epoch"""
    steps = EPOCHS * PICTURES // BATCH // ranks
    for i in range(count):
        name = f'terminated-{i}-of-{ranks}'
        process = site.start(name, ranks=ranks)
        site.until_step(name, process, site.random.randrange(2, steps // 2))
        process.send_signal(signal.SIGTERM)
        status = wait(process, 30)  # torchrun kills what takes longer
        yield (status != 0 and site.said(name, 'SIGTERM: the run stops')
               and site.finish(name, ranks=ranks)
               and site.same(name, ranks=ranks))


def terminate_two_ranks(site: Site, count: int) -> Iterator[bool]:
    """SIGTERM to the launcher of two ranks"""
    return terminate(site, count, ranks=2)


def fill_disk(site: Site, count: int) -> Iterator[bool]:
    """No room on the disk for the next checkpoint"""
    size = newest(site.peace()).stat().st_size
    for i in range(count):
        name = f'full-{i}'
        site.kill_after_save(name)
        before = {*(site.folder / name).glob('iter_*')}
        room = int(size * site.random.uniform(0.5, 0.95))
        status = wait(site.start(name, max_file=room))
        after = {*(site.folder / name).glob('*iter_*')}
        yield (status != 0 and before == after
               and site.said(name, 'could not be written', '--resume')
               and site.finish(name) and site.same(name))


def lock_folder(site: Site, count: int) -> Iterator[bool]:
    """A work_dir that is read-only"""
    for i in range(count):
        name = f'read-only-{i}'
        site.kill_after_save(name)
        status = wait(site.start(name, read_only=True))
        yield (status == 2 and site.said(
            name, 'Cannot write into the work_dir', 'Read-only')
               and site.finish(name) and site.same(name))


def truncate(site: Site, count: int) -> Iterator[bool]:
    """The newest checkpoint cut off or damaged"""
    for i in range(count):
        name = f'truncated-{i}'
        site.kill_after_save(name, saves=2)
        path = newest(site.folder / name)
        size = path.stat().st_size
        place = site.random.randrange(size // 2)
        if i % 3 == 0:
            os.truncate(path, 0)
        elif i % 3 == 1:
            os.truncate(path, place)
        else:
            with open(path, 'r+b') as file:
                file.seek(place)
                file.write(os.urandom(64))
        yield (site.finish(name) and site.said(name, path.name, 'passed over')
               and site.same(name))


def kill_rank(site: Site, count: int) -> Iterator[bool]:
    """SIGKILL to one of two ranks"""
    for i in range(count):
        name, rank = f'dead-rank-{i}', i % 2
        process = site.start(name, ranks=2)
        site.until_step(name, process, site.random.randrange(6, 30))
        os.kill(_pid_of_rank(process.pid, rank), signal.SIGKILL)
        yield (wait(process, WITHIN) not in (0, -signal.SIGKILL)
               and site.said(name, f'rank      : {rank} ')
               and site.finish(name, ranks=2) and site.same(name, ranks=2))


def _pid_of_rank(agent: int, rank: int) -> int:
    for pid in descendants(agent):
        env = Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
        if b'RANK=%d' % rank in env:
            return pid
    raise RuntimeError(f'There is no process of rank {rank}')


def kill_worker(site: Site, count: int) -> Iterator[bool]:
    """SIGKILL to a process that loads pictures"""
    for i in range(count):
        name = f'dead-worker-{i}'
        process = site.start(name)
        site.until_step(name, process, site.random.randrange(2, 100))
        workers = descendants(process.pid)
        os.kill(site.random.choice(workers), signal.SIGKILL)
        yield (wait(process, WITHIN) not in (0, -signal.SIGKILL)
               and site.said(name, 'DataLoader worker') and site.finish(name)
               and site.same(name))


def break_pictures(site: Site, count: int) -> Iterator[bool]:
    """0.1%, 1% or 5% of a folder are no whole pictures"""
    total = 1000
    for i in range(count):
        folder = site.folder / f'pictures-{i}'
        write_pictures(folder, total, size=16)
        number = int(total * (0.001, 0.01, 0.05)[i % 3])
        broken = site.random.sample(sorted(folder.iterdir()), number)
        for kind, path in enumerate(broken):
            data = path.read_bytes()
            path.write_bytes(
                [b'', data[:len(data) // 2], b'<html>404</html>',
                 data[60:]][kind % 4])
        name = f'broken-pictures-{i}'
        options = [
            f'data_root={folder}', 'train_cfg.max_epochs=1',
            'train_dataloader.batch_size=50', 'model.queue_len=1000'
        ]
        status = wait(site.start(name, *options))
        listed = site.folder / name / 'unreadable.txt'
        yield (status == 0 and site.said(name, f'{number} of {total} ') and {
            Path(x).name
            for x in listed.read_text(encoding='utf-8').splitlines()
        } == {x.name
              for x in broken})


def remove_pictures(site: Site, count: int) -> Iterator[bool]:
    """Pictures deleted while the run goes on, fewer or more than allowed"""
    for i in range(count):
        folder = site.folder / f'vanishing-{i}'
        write_pictures(folder, PICTURES)
        name, many = f'vanished-{i}', i % 2 == 1
        process = site.start(name, f'data_root={folder}')
        site.until_step(name, process, 10)
        for path in sorted(folder.iterdir())[:PICTURES // 2 if many else 2]:
            path.unlink()
        status = wait(process)
        if many:
            yield (status != 0 and site.said(name, 'max_unreadable')
                   and finite(newest(site.folder / name)))
        else:
            yield status == 0 and site.said(name, f'2 of {PICTURES} ')


def break_loss(site: Site, count: int) -> Iterator[bool]:
    """A loss that is not finite"""
    for i in range(count):
        name = f'nan-{i}'
        site.kill_after_save(name)
        files = {*(site.folder / name).glob('iter_*')}
        status = wait(site.start(name, 'model.head.loss.temperature=1e-42'))
        yield (status != 0 and site.said(name, 'not finite', 'last good')
               and {*(site.folder / name).glob('iter_*')} == files
               and site.finish(name) and site.same(name))


def start_twice(site: Site, count: int) -> Iterator[bool]:
    """A second run in the work_dir of one that runs"""
    for i in range(count):
        name = f'twice-{i}'
        process = site.start(name)
        site.until_step(name, process, site.random.randrange(2, 50))
        second = wait(site.start(name))
        yield (second == 2 and site.said(name, 'Another run works in')
               and wait(process) == 0 and site.same(name))


FAULTS: Dict[Fault, int] = {
    kill_anywhere: 35,
    kill_in_save: 15,
    terminate: 5,
    terminate_two_ranks: 3,
    fill_disk: 3,
    lock_folder: 2,
    truncate: 6,
    kill_rank: 2,
    kill_worker: 3,
    break_pictures: 3,
    remove_pictures: 2,
    break_loss: 1,
    start_twice: 2,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        '--only',
        nargs='+',
        choices=[fault.__name__ for fault in FAULTS],
        help='these faults alone')
    parser.add_argument(
        '--count', type=int, help='injections of each fault, not its own')
    parser.add_argument(
        '--seed', type=int, default=0, help='of the moments of the faults')
    parser.add_argument(
        '--folder',
        type=Path,
        help='where to work and to keep the runs; by default a temporary one, '
        'kept if something was lost')
    args = parser.parse_args()
    if args.folder and args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f'--folder {args.folder} is not empty')
    return args


def main() -> None:
    args = parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix='fault-drill-'))
    site = Site(folder.absolute(), args.seed)
    table = Table('fault', 'injections', 'survived', 'lost', box=MARKDOWN)
    any_lost = False
    with Progress(transient=True) as progress:
        for fault, count in FAULTS.items():
            if args.only and fault.__name__ not in args.only:
                continue
            title = fault.__doc__
            bar = progress.add_task(title, total=args.count or count)
            results: List[bool] = []
            for survived in fault(site, args.count or count):
                results.append(survived)
                progress.advance(bar)
            lost = len(results) - sum(results)
            any_lost |= lost > 0
            table.add_row(title, *map(str, (len(results), sum(results), lost)))
    Console().print(table)
    if any_lost:
        sys.exit(f'Something was lost: see the runs in {folder}')
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == '__main__':
    main()
