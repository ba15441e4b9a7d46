# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Two machines, played by two torchruns of one process each, train as one.

What they end with is compared, bit for bit, with two processes of one
machine, which need no torchrun.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch
from ranks import ROOT, TOOLS, train_ranks

from mmdensecl.benchmark.runner import free_port
from mmdensecl.checkpoint import load_from_local

sys.path.append(str(ROOT / 'tests/tools'))
from runs import prepare  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU ranks'),
]

EPOCHS = 2
TIME_LIMIT = 300

CONFIG = f"""
_base_ = './tiny.py'
data_root = 'pictures'
model = dict(queue_len=16)
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
train_cfg = dict(max_epochs={EPOCHS})
# A machine that stays silent is given up after so many seconds.
env_cfg = dict(dist_cfg=dict(timeout=300))
"""

# Rank 1 and the torchrun that started it are gone, at once, in the middle of
# the second epoch; the run that comes after it lives on.
POWER_CUT = """
import os
import signal
from pathlib import Path
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmdensecl.registry import HOOKS


@HOOKS.register_module()
class PowerCut(Hook):

    def after_train_iter(self, runner, batch_idx, *args, **kwargs):
        happened = Path('power_cut')
        if (get_rank() == 1 and runner.epoch == 1 and batch_idx == 0
                and not happened.exists()):
            happened.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
"""

CUT_CONFIG = """
_base_ = './nodes.py'
custom_imports = dict(imports=['power_cut'])
custom_hooks = _base_.custom_hooks + [dict(type='mmdensecl.PowerCut')]
"""


def environment(**changes):
    return dict(
        os.environ,
        PYTHONPATH='.',  # for power_cut.py; the launcher adds the package
        PYTHON=sys.executable,
        OMP_NUM_THREADS='1',
        **changes,
    )


def final(folder):
    return load_from_local(folder / f'epoch_{EPOCHS}.pth')


def assert_same(a, b):
    """The same weights, queues, momentum, bit for bit."""
    a, b = final(a), final(b)
    assert a['state_dict'].keys() == b['state_dict'].keys()
    for name, expected in a['state_dict'].items():
        assert torch.equal(b['state_dict'][name], expected), name
    a, b = (x['optimizer']['state'] for x in (a, b))
    assert a.keys() == b.keys()
    for key, state in a.items():
        assert torch.equal(
            state['momentum_buffer'], b[key]['momentum_buffer']
        ), key


def write_configs(folder):
    prepare(folder)
    (folder / 'nodes.py').write_text(CONFIG)
    (folder / 'cut.py').write_text(CUT_CONFIG)
    (folder / 'power_cut.py').write_text(POWER_CUT)
    return folder


@pytest.fixture(scope='module')
def one_machine(tmp_path_factory):
    """Folder of a run of two processes that nothing interrupted."""
    folder = write_configs(tmp_path_factory.mktemp('one'))
    with train_ranks(folder, 'nodes.py', 2) as ranks:
        for done in [x.result() for x in ranks]:
            assert done.returncode == 0, done.stdout[-3000:]
    return folder / 'work_dirs/nodes'


class Nodes:
    """Starts torchruns of one process each, and ends those that are left."""

    def __init__(self, folder):
        self.folder, self.started = folder, []

    def start(self, *args, **env):
        with open(self.folder / f'{len(self.started)}.log', 'w') as log:
            self.started.append(
                subprocess.Popen(
                    ['bash', TOOLS / 'dist_train.sh', *args],
                    cwd=self.folder,
                    env=environment(NNODES='2', **env),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return len(self.started) - 1

    def wait(self, number):
        code = self.started[number].wait(TIME_LIMIT)
        return code, (self.folder / f'{number}.log').read_text()[-3000:]

    def end(self):
        for node in self.started:  # torchrun ends what it started
            node.terminate()
        for node in self.started:
            node.wait(60)


@pytest.fixture
def nodes(tmp_path):
    nodes = Nodes(write_configs(tmp_path))
    yield nodes
    nodes.end()


def test_two_machines_train_as_one(one_machine, nodes):
    address = dict(MASTER_ADDR='127.0.0.1', PORT=str(free_port()))
    for node in ('0', '1'):
        nodes.start('nodes.py', '1', NODE_RANK=node, **address)
    for number in (0, 1):
        code, log = nodes.wait(number)
        assert code == 0, log
    assert_same(one_machine, nodes.folder / 'work_dirs/nodes')


def test_one_is_lost_and_comes_back(one_machine, nodes):
    """The other waits for it, and they resume from the last checkpoint."""
    env = dict(
        RDZV_ENDPOINT=f'127.0.0.1:{free_port()}',
        # Seconds; a machine is given up after two of them instead of 15.
        PET_RDZV_CONF='keep_alive_interval=1,keep_alive_max_attempt=2',
        MAX_RESTARTS='2',
    )
    for node in ('0', '1'):
        nodes.start('cut.py', '1', '--resume', NODE_RANK=node, **env)
    code, log = nodes.wait(1)
    assert code == -signal.SIGKILL, log
    nodes.start('cut.py', '1', '--resume', NODE_RANK='1', **env)
    logs = ''
    for number in (0, 2):
        code, log = nodes.wait(number)
        assert code == 0, log
        logs += (nodes.folder / f'{number}.log').read_text()
    assert_same(one_machine, nodes.folder / 'work_dirs/cut')
    assert 'resumed epoch: 1' in logs
