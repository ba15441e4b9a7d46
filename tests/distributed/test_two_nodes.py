# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Two machines, played by two torchruns of one process each, train as one.

What they end with is compared, bit for bit, with two processes of one
machine, which need no torchrun.
"""

import signal
import subprocess

import pytest
import torch
from runs import TOOLS, assert_same, ended, environment, prepare, tool_ranks

from mmdensecl.benchmark.runner import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU ranks'),
]
TIME_LIMIT = 300
LAST = 'epoch_2.pth'

CONFIG = """
_base_ = './tiny.py'
data_root = 'pictures'
model = dict(queue_len=16)
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
# A machine that stays silent is given up after so many seconds.
env_cfg = dict(dist_cfg=dict(timeout=300))
"""
# Rank 1 and the torchrun that started it are gone, at once, in the middle of
# the second epoch; the run that comes after it lives on.
CUT_CONFIG = """
_base_ = './nodes.py'
custom_imports = dict(imports=['broken_parts'])
custom_hooks = _base_.custom_hooks + [dict(
    type='Strike', name='SIGKILL', at=4, rank=1, parent=True, file='cut')]
"""


def write_configs(folder):
    prepare(folder)
    (folder / 'nodes.py').write_text(CONFIG)
    (folder / 'cut.py').write_text(CUT_CONFIG)
    return folder


@pytest.fixture(scope='module')
def one_machine(tmp_path_factory):
    """End of a run of two processes that nothing interrupted."""
    folder = write_configs(tmp_path_factory.mktemp('one'))
    with tool_ranks('train.py nodes.py', 2, folder) as ranks:
        ended([x.result() for x in ranks], 0, 0)
    return folder / 'work_dirs/nodes' / LAST


class Nodes:
    """Starts torchruns of one process each, and ends those that are left."""

    def __init__(self, folder):
        self.folder, self.started = folder, []

    def start(self, *args, **env):
        with open(self.folder / f'{len(self.started)}.log', 'w') as log:
            process = subprocess.Popen(
                ['bash', TOOLS / 'dist_train.sh', *args],
                cwd=self.folder,
                env=environment(NNODES='2', **env),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)

    def wait(self, number, expected=0):
        """Return the log."""
        code = self.started[number].wait(TIME_LIMIT)
        log = (self.folder / f'{number}.log').read_text()
        assert code == expected, log[-3000:]
        return log

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
        nodes.wait(number)
    assert_same(one_machine, nodes.folder / 'work_dirs/nodes' / LAST)


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
    nodes.wait(1, -signal.SIGKILL)
    nodes.start('cut.py', '1', '--resume', NODE_RANK='1', **env)
    logs = nodes.wait(0) + nodes.wait(2)
    assert_same(one_machine, nodes.folder / 'work_dirs/cut' / LAST)
    assert 'resumed epoch: 1' in logs
