# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""tools/train.py while its data and the processes that load them fail."""

import re
import signal
import time
from pathlib import Path

import pytest
import runs
import torch

from mmdensecl.checkpoint import load_from_local
from mmdensecl.testing import write_pictures

# Faults are added to it; `broken_parts` is beside this file.
CONFIG = """
_base_ = './tiny.py'
custom_imports = dict(imports=['broken_parts'])
custom_hooks = _base_.custom_hooks + [{hooks}]
train_dataloader = dict(num_workers=2, persistent_workers=True)
train_dataloader['dataset'] = dict(pipeline=[
    {transforms}
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews')])
"""
STATE = 'work_dirs/faulty'


@pytest.fixture
def workplace(tmp_path):
    return runs.prepare(tmp_path)


def train(folder, words='', options='', hooks='', transforms=''):
    """A run with such faults: its exit status and what it said."""
    config = CONFIG.format(hooks=hooks, transforms=transforms)
    (folder / 'faulty.py').write_text(config)
    done = runs.train(folder, f'faulty.py {words}', options, check=False)
    return done.returncode, done.stdout


def spoil(workplace, count, step):
    """Write so many pictures, each so many of them broken: their names."""
    write_pictures(workplace / 'pictures', count)
    names = [f'{i:04d}.png' for i in range(0, count, step)]
    for name in names:
        (workplace / 'pictures' / name).write_bytes(b'')
    return names


def assert_good(path):
    for name, x in load_from_local(path)['state_dict'].items():
        assert torch.isfinite(x).all(), name


def test_broken_and_vanished_pictures(workplace):
    """Listed once, and the run is as long as it should be."""
    write_pictures(workplace / 'pictures', 40)
    (workplace / 'pictures/0005.png').write_bytes(b'')
    (workplace / 'pictures/a\nb.png').write_bytes(b'<html>404</html>')
    names = "source='pictures/0020.png', target='elsewhere'"
    hook = f"dict(type='MoveFile', at=2, {names})"
    status, log = train(workplace, hooks=hook)
    assert status == 0, log[-5000:]
    assert '[2][10/10]' in log
    # Met in the first epoch, or read ahead there and met in the second.
    assert '3 of 41 images could not be read' in log
    assert r"'a\nb.png'" in log
    listed = (workplace / STATE / 'unreadable.txt').read_text()
    assert listed.startswith('0005.png\n0020.png\n')
    assert_good(workplace / STATE / 'epoch_2.pth')


def test_broken_pictures_met_before_a_stop(workplace):
    """Five, counted and listed as if the run had not been stopped."""
    broken = spoil(workplace, 120, 24)
    once = 'train_cfg.max_epochs=1'
    strike = "dict(type='Strike', name='SIGTERM', at=24)"
    status, log = train(workplace, options=once, hooks=strike)
    assert status == 128 + signal.SIGTERM, log[-5000:]
    assert 'could not be read' not in log
    status, log = train(workplace, '--resume', once)
    assert status == 0 and '[1][30/30]' in log, log[-5000:]
    assert '5 of 120 images could not be read' in log
    listed = (workplace / STATE / 'unreadable.txt').read_text()
    assert listed.split() == broken


def test_more_broken_pictures_than_allowed(workplace):
    """The list that the error names is there."""
    broken = spoil(workplace, 120, 3)
    status, log = train(workplace)
    assert status == 1
    words = '(\\d+) of 120 images .* Mend or remove them, as named in '
    found = re.search(rf'{words}"(.*{STATE}/unreadable.txt)"', log)
    assert found, log[-5000:]
    listed = (workplace / found[2]).read_text().split()
    assert 12 < int(found[1]) <= len({*listed})
    assert {*listed} <= {*broken}


def test_a_folder_that_vanishes_and_comes_back(workplace):
    names = "source='pictures', target='unmounted'"
    hook = f"dict(type='MoveFile', at=4, {names})"
    status, log = train(workplace, '', 'train_cfg.max_epochs=30', hook)
    assert status != 0
    # Two of twelve are more than a tenth, and both workers meet some.
    assert re.search('[2-9] of 12 images in "pictures" cannot be read', log)
    assert 'No such file or directory' in log
    assert_good((workplace / STATE / 'last_checkpoint').read_text())
    (workplace / 'unmounted').rename(workplace / 'pictures')
    status, log = train(workplace, '--resume', 'train_cfg.max_epochs=4')
    assert status == 0 and '[4][3/3]' in log, log[-5000:]


def test_a_killed_worker(workplace):
    """Of those that persist, in the second epoch: an error, and no hang."""
    flag = workplace / 'flag'
    flag.touch()
    kill = f"dict(type='KillWorker', flag='{flag}', after=10),"
    start = time.time()
    status, log = train(workplace, transforms=kill)
    last = max(path.stat().st_mtime for path in workplace.glob('flag.*'))
    assert status == 1 and not flag.exists()
    assert time.time() - last < 30 and last > start
    assert 'DataLoader worker (pid' in log
    assert 'is killed by signal: Killed' in log
    saved = [x.name for x in (workplace / STATE).glob('*.pth')]
    assert saved == ['epoch_1.pth']
    # The other worker does not live on.
    pids = [int(path.suffix[1:]) for path in workplace.glob('flag.*')]
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(Path(f'/proc/{pid}').exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)
    status, log = train(workplace, '--resume', transforms=kill)
    assert status == 0 and '[2][3/3]' in log, log[-5000:]
    assert '[1][1/3]' not in log
