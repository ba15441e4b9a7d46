# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Two machines, played by two torchruns of one process each, train as one.

What they end with is compared, bit for bit, with two processes of one
machine, which need no torchrun.
"""
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmdensecl.benchmark.runner import free_port
from mmdensecl.checkpoint import load_from_local
from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'
sys.path.append(str(ROOT / 'tests/tools'))
from forks import run_script  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU ranks')
]

EPOCHS, STEPS = 3, 2
TIME_LIMIT = 300

CONFIG = f"""
_base_ = '{ROOT}/configs/demo/densecl_r18w16_1xb64-coslr-40e_tiles.py'
data_root = 'pictures'
model = dict(
    queue_len=16, neck=dict(in_channels=32, hid_channels=16),
    backbone=dict(
        num_stages=2, strides=(2, 2), dilations=(1, 1), out_indices=(1, ),
        stem_channels=16, base_channels=16))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False,
    dataset=dict(data_root=data_root))
train_dataloader['dataset']['pipeline'] = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews')]
optim_wrapper = dict(enabled=False)  # float32 on any processor
train_cfg = dict(max_epochs={EPOCHS})
default_hooks = dict(logger=dict(interval=1))
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
_base_ = './tiny.py'
custom_imports = dict(imports=['power_cut'])
custom_hooks = _base_.custom_hooks + [dict(type='mmdensecl.PowerCut')]
"""

# Two machines joined by a cable, for as long as this runs. Neither root nor
# cleaning up is needed: all of it belongs to this process.
CABLE = """
set -eu
mount -t tmpfs none /run  # where ip keeps the names
for node in 0 1; do ip netns add node$node; done
ip -n node0 link add cable0 type veth peer name cable1 netns node1
for node in 0 1; do
    ip -n node$node addr add 10.77.0.1$node/24 dev cable$node
    ip -n node$node link set cable$node up
    ip -n node$node link set lo up
done
"""

TRAIN_ON_BOTH = CABLE + """
for node in 0 1; do
    NODE_RANK=$node GLOO_SOCKET_IFNAME=cable$node ip netns exec node$node \
        bash "$@" >node$node.log 2>&1 &
done
wait -n && wait -n || status=$?
ip netns exec node0 cat /sys/class/net/cable0/statistics/tx_bytes
exit ${status:-0}
"""


def unshared(script, *args):
    """A command that runs a shell script in a network of its own."""
    return [
        'unshare', '--user', '--map-root-user', '--mount', '--net', '--pid',
        '--fork', '--kill-child', 'bash', '-c', script, 'bash', *args
    ]


def environment(**changes):
    return dict(
        os.environ,
        PYTHONPATH='.',  # for power_cut.py; the launcher adds the package
        PYTHON=sys.executable,
        OMP_NUM_THREADS='1',
        **changes)


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
        assert torch.equal(state['momentum_buffer'],
                           b[key]['momentum_buffer']), key


@pytest.fixture
def workplace(tmp_path):
    return prepare(tmp_path)


def prepare(folder):
    write_pictures(folder / 'pictures', 4 * STEPS)
    (folder / 'tiny.py').write_text(CONFIG)
    (folder / 'cut.py').write_text(CUT_CONFIG)
    (folder / 'power_cut.py').write_text(POWER_CUT)
    return folder


@pytest.fixture(scope='module')
def one_machine(tmp_path_factory):
    """Folder of a run of two processes that nothing interrupted."""
    folder = prepare(tmp_path_factory.mktemp('one'))
    port = str(free_port())

    def rank(number):
        return run_script(
            TOOLS / 'train.py',
            'tiny.py',
            '--launcher',
            'pytorch',
            cwd=folder,
            env=dict(
                RANK=str(number),
                LOCAL_RANK=str(number),
                WORLD_SIZE='2',
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=port))

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(rank, range(2)):
            assert done.returncode == 0, done.stdout[-3000:]
    return folder / 'work_dirs/tiny'


def test_joined_by_a_cable(one_machine, workplace):
    """Each sees its own network interface only, and the cable to the other."""
    if not shutil.which('unshare') or not shutil.which('ip'):
        pytest.skip('needs unshare and ip')
    tried = subprocess.run(
        unshared(CABLE), capture_output=True, text=True, timeout=30)
    if tried.returncode:
        pytest.skip(f'no network namespaces here: {tried.stderr.strip()}')
    done = subprocess.run(
        unshared(TRAIN_ON_BOTH, TOOLS / 'dist_train.sh', 'tiny.py', '1'),
        cwd=workplace,
        env=environment(NNODES='2', MASTER_ADDR='10.77.0.10', PORT='29500'),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT)
    logs = [(workplace / f'node{x}.log').read_text()[-3000:] for x in (0, 1)]
    assert done.returncode == 0, '\n'.join([done.stderr, *logs])
    assert_same(one_machine, workplace / 'work_dirs/tiny')
    # The gradients at least went over the cable in each step.
    state = final(one_machine)
    trained = sum(x['momentum_buffer'].numel()
                  for x in state['optimizer']['state'].values())
    assert int(done.stdout) > EPOCHS * STEPS * 4 * trained


def test_one_is_lost_and_comes_back(one_machine, workplace):
    """The other waits for it, and they go on from the last checkpoint."""
    endpoint = f'127.0.0.1:{free_port()}'
    nodes = []

    def start(node):
        with open(workplace / f'node{len(nodes)}.log', 'w') as log:
            nodes.append(
                subprocess.Popen(
                    [
                        'bash', TOOLS / 'dist_train.sh', 'cut.py', '1',
                        '--resume'
                    ],
                    cwd=workplace,
                    env=environment(
                        NNODES='2',
                        NODE_RANK=str(node),
                        RDZV_ENDPOINT=endpoint,
                        # Seconds; a machine is given up after
                        # three of them instead of 15.
                        PET_RDZV_CONF='keep_alive_interval=1',
                        MAX_RESTARTS='2'),
                    stdout=log,
                    stderr=subprocess.STDOUT))
        return nodes[-1]

    def log(number):
        return (workplace / f'node{number}.log').read_text()

    try:
        first, lost = start(0), start(1)
        assert lost.wait(TIME_LIMIT) == -signal.SIGKILL, log(1)[-3000:]
        again = start(1)
        assert first.wait(TIME_LIMIT) == 0, log(0)[-3000:]
        assert again.wait(TIME_LIMIT) == 0, log(2)[-3000:]
    finally:
        for node in nodes:  # torchrun ends what it started
            node.terminate()
        for node in nodes:
            node.wait(60)
    assert_same(one_machine, workplace / 'work_dirs/cut')
    assert 'resumed epoch: 1' in log(0) + log(2)
