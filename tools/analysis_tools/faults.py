# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A small training run, and what can be done to it: for fault_drill.py.

The run is a real one, ``tools/train.py`` in a process of its own with worker
processes. A run that was hurt goes on by ``--resume``, and has survived if it
ends with the very bits of one that was left in peace: weights of both
encoders, queues, optimizer, and each loss that was logged on the way, also
those of iterations that were repeated.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch

from mmdensecl.checkpoint import load_from_local
from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
PICTURES, BATCH, EPOCHS = 48, 4, 20
PATIENCE = 300  # seconds

# A shell script to be run where mounts concern nobody else, and one that
# starts what comes after a folder; file modes do not keep out root.
IN_OWN_MOUNTS = [
    'unshare', '--user', '--map-root-user', '--mount', 'bash', '-ec'
]
READ_ONLY = """
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
exec "$@"
"""

CONFIG = """
_base_ = '{root}/configs/demo/densecl_r18_1xb32-coslr-20e_tiles.py'
data_root = {pictures!r}
model = dict(
    queue_len=4096, neck=dict(in_channels=32, hid_channels=32),
    backbone=dict(
        num_stages=2, strides=(2, 2), dilations=(1, 1), out_indices=(1, ),
        stem_channels=16, base_channels=16))
train_dataloader = dict(
    batch_size={batch}, num_workers=2, dataset=dict(data_root=data_root))
train_dataloader['dataset']['pipeline'] = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews')]
train_cfg = dict(max_epochs={epochs})
param_scheduler = dict(T_max={epochs})
# Five iterations do not divide an epoch of twelve: most are in its middle.
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(by_epoch=False, interval=5, max_keep_ckpts=2))
randomness = dict(seed=0, deterministic=True)
"""


class Site:
    """A folder with pictures and a config, where runs are started.

    Args:
        folder (Path): Made where it is missing.
        seed (int): Of the moments at which faults happen.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.config = folder / 'drill.py'
        folder.mkdir(parents=True, exist_ok=True)
        write_pictures(folder / 'pictures', PICTURES)
        self.config.write_text(
            CONFIG.format(
                root=ROOT,
                pictures=str(folder / 'pictures'),
                batch=BATCH,
                epochs=EPOCHS),
            encoding='utf-8')
        self._seconds = 0.

    @property
    def seconds(self) -> float:
        """How long a run takes that nothing happens to."""
        self.peace()
        return self._seconds

    def peace(self, ranks: int = 1) -> Path:
        """The work_dir of a run that nothing happens to.

        Args:
            ranks (int): Processes. Defaults to 1.

        Returns:
            Path: The folder. The first call for a number makes it.
        """
        name = f'in-peace-{ranks}'
        if not (self.folder / name).is_dir():
            begin = time.monotonic()
            if not self.finish(name, ranks=ranks):
                raise RuntimeError('A run that nothing happened to failed: '
                                   f'see {self.log(name)}')
            self._seconds = self._seconds or time.monotonic() - begin
        return self.folder / name

    def start(self,
              name: str,
              *options: str,
              ranks: int = 1,
              max_file: Optional[int] = None,
              read_only: bool = False) -> subprocess.Popen:
        """Start a run, or go on with it.

        Args:
            name (str): Of its work_dir; one run for each.
            *options (str): Settings for ``--cfg-options``.
            ranks (int): Processes. Defaults to 1.
            max_file (int, optional): Bytes that a file may have, as on a
                full disk. Defaults to None.
            read_only (bool): Whether its work_dir, which must be there, is
                mounted so for it. Defaults to False.

        Returns:
            subprocess.Popen: A leader of a process group.
        """
        flags = [
            str(self.config), '--work-dir',
            str(self.folder / name), '--resume'
        ]
        if options:
            flags += ['--cfg-options', *options]
        command = [sys.executable, str(ROOT / 'tools/train.py'), *flags]
        if ranks > 1:
            command = [
                'bash',
                str(ROOT / 'tools/dist_train.sh'), flags[0],
                str(ranks), *flags[1:]
            ]
        if read_only:
            command = [
                *IN_OWN_MOUNTS, READ_ONLY,
                str(self.folder / name), *command
            ]
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable)
        env['PYTHONPATH'] = os.pathsep.join(
            filter(None, [str(ROOT), env.get('PYTHONPATH')]))

        def limit() -> None:
            import resource  # not on Windows
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))

        with open(self.log(name), 'ab') as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limit if max_file else None)

    def log(self, name: str) -> Path:
        """What the starts of a run have printed."""
        return self.folder / f'{name}.log'

    def said(self, name: str, *words: str) -> bool:
        """Whether a run has printed all of these."""
        text = self.log(name).read_text(encoding='utf-8', errors='replace')
        return all(word in text for word in words)

    def finish(self, name: str, **how: Any) -> bool:
        """Let a run go on to its end; whether it got there."""
        return wait(self.start(name, **how)) == 0

    def until_step(self, name: str, process: subprocess.Popen,
                   step: int) -> None:
        """Wait until a start of a run has logged so many iterations.

        Args:
            name (str): Of the run.
            process (Popen): This start of it, the first.
            step (int): Iterations.
        """
        until(
            lambda: self.log(name).read_bytes().count(b'Epoch(train)') >= step,
            process)

    def kill_after_save(self, name: str, saves: int = 1) -> None:
        """Start a run and kill it as soon as it has saved so often.

        Args:
            name (str): Of the run.
            saves (int): Checkpoints. Defaults to 1.
        """
        process = self.start(name)
        folder = self.folder / name
        until(lambda: len([*folder.glob('iter_*.pth')]) >= saves, process)
        kill(process)

    def same(self, name: str, ranks: int = 1) -> bool:
        """Whether a run has ended like one that nothing happened to."""
        try:
            tensors, losses = outcome(self.folder / name)
        except (ValueError, OSError):
            return False
        expected, once = outcome(self.peace(ranks))
        return (tensors.keys() == expected.keys()
                and all(map(equal, tensors.values(), expected.values()))
                and losses == once)


def newest(work_dir: Path) -> Path:
    """The checkpoint of a run with the most iterations."""
    return max(
        work_dir.glob('iter_*.pth'),
        key=lambda path: int(path.stem.partition('_')[2]))


def outcome(work_dir: Path) -> Tuple[Dict[str, Any], Dict[int, set]]:
    """What a run has come to.

    Args:
        work_dir (Path): Of the run.

    Returns:
        tuple: The values of the last checkpoint by name, and for each
        iteration the losses logged, of which there is one set as long as a
        repetition is exact.
    """
    checkpoint = load_from_local(newest(work_dir))
    values = dict(flatten(checkpoint['state_dict'], 'model'))
    values.update(flatten(checkpoint['optimizer'], 'optimizer'))
    losses: Dict[int, set] = {}
    for path in work_dir.glob('*/vis_data/scalars.json'):
        for line in path.read_text(encoding='utf-8').splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            losses.setdefault(row['step'], set()).add(
                tuple(row[x] for x in sorted(row) if 'loss' in x))
    return values, losses


def finite(path: Path) -> bool:
    """Whether all tensors of a checkpoint are."""
    return all(
        bool(torch.isfinite(x).all())
        for _, x in flatten(load_from_local(path), '') if torch.is_tensor(x))


def flatten(value: Any, name: str) -> Iterator[Tuple[str, Any]]:
    """The leaves of nested containers, each with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f'{name}.{key}')
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from flatten(item, f'{name}.{key}')
    else:
        yield name, value


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def wait(process: subprocess.Popen, patience: float = PATIENCE) -> int:
    """Wait for a process; its whole group is gone afterwards.

    Args:
        process (subprocess.Popen): A leader of its group.
        patience (float): Seconds; what runs longer is killed. Defaults to
            300.

    Returns:
        int: Its exit status.
    """
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a run and all of its processes at once, as a machine dies."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def until(condition: Callable[[], Any],
          process: subprocess.Popen,
          patience: float = PATIENCE) -> Any:
    """Watch closely until something happens, or the process ends.

    Args:
        condition (Callable): What is waited for.
        process (subprocess.Popen): Of the run.
        patience (float): Seconds. Defaults to 300.

    Returns:
        Any: What the condition gave, false where the process ended first.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = condition()
        if found or process.poll() is not None:
            return found
        time.sleep(0.002)
    return None


def descendants(pid: int) -> List[int]:
    """Processes that a process has started, and those that these have."""
    found = []
    for path in Path(f'/proc/{pid}/task').glob('*/children'):
        for child in map(int, path.read_text(encoding='utf-8').split()):
            found += [child, *descendants(child)]
    return found
