# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""One of two ranks dies, hangs, or gets a loss that is not finite."""

import os
import signal
import time

import pytest
import torch
from runs import TOOLS, prepare, run, tool_ranks

from mmdensecl.benchmark.runner import free_port
from mmdensecl.checkpoint import load_from_local

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU ranks'),
]

CONFIG = """
_base_ = './tiny.py'
custom_imports = dict(imports=['broken_parts'])
custom_hooks = _base_.custom_hooks + [dict(type={hook}, at=4, rank=1)]
data_root = 'pictures'
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
train_cfg = dict(max_epochs=3)
env_cfg = dict(dist_cfg=dict(timeout={timeout}))
"""


@pytest.fixture
def workplace(tmp_path):
    return prepare(tmp_path)


def write_config(folder, hook, timeout=300):
    text = CONFIG.format(hook=hook, timeout=timeout)
    (folder / 'faulty.py').write_text(text)


def assert_first_epoch_is_kept(folder):
    folder = folder / 'work_dirs' / 'faulty'
    assert [x.name for x in folder.glob('*.pth')] == ['epoch_1.pth']
    state = load_from_local(folder / 'epoch_1.pth')['state_dict']
    for name, x in state.items():
        assert torch.isfinite(x).all(), name


def test_a_killed_rank(workplace):
    """The other ends within a minute, and it is said which one died."""
    write_config(workplace, "'Strike', name='SIGKILL', file='pid'")
    done = run(
        *['bash', TOOLS / 'dist_train.sh', 'faulty.py', 2],
        cwd=workplace,
        env=dict(PORT=str(free_port())),
        check=False,
    )
    pid, log = workplace / 'pid', done.stdout
    assert done.returncode != 0
    assert time.time() - pid.stat().st_mtime < 60
    assert 'Root Cause' in log and 'rank      : 1 (local_rank: 1)' in log
    assert f'Signal 9 (SIGKILL) received by PID {pid.read_text()}' in log
    assert_first_epoch_is_kept(workplace)


def test_a_rank_that_hangs(workplace):
    """The other gives up after dist_cfg.timeout, here 5 seconds."""
    write_config(workplace, "'Strike', name='SIGSTOP', file='pid'", timeout=5)
    pid = workplace / 'pid'
    with tool_ranks('train.py faulty.py', 2, workplace) as ranks:
        try:
            log = ranks[0].result().stdout
            waited = time.time() - pid.stat().st_mtime
        finally:
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGKILL)
    assert 'Timed out' in log or 'timed out' in log, log
    assert 5 <= waited < 60
    assert_first_epoch_is_kept(workplace)


def test_a_loss_that_is_not_finite(workplace):
    """On one rank: both stop, and nothing of it is saved."""
    write_config(workplace, "'Poison'")
    with tool_ranks('train.py faulty.py', 2, workplace) as ranks:
        logs = [rank.result().stdout for rank in ranks]
    assert 'The loss is not finite at epoch 2, iteration 5' in logs[1]
    assert 'The batch begins with: 00' in logs[1]
    assert_first_epoch_is_kept(workplace)
