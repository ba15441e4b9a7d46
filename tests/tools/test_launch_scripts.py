# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What tools/dist_*.sh start; nothing is started here.

Real runs are in tests/distributed/test_two_nodes.py and test_train.py.
"""

import os
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

TOOLS = Path(__file__).parents[2] / 'tools'
ELASTIC = dict(RDZV_ENDPOINT='node7:29400', MAX_RESTARTS='3')


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Function that gives what torchrun would be asked, and in what."""
    fake = tmp_path / 'fake_python'
    fake.write_text(
        '#!/usr/bin/env bash\n'
        'printf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"\n'
        'printf "%s\\n" "$@"\n'
    )
    fake.chmod(0o755)
    for name in ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', *ELASTIC):
        monkeypatch.delenv(name, raising=False)

    def start(*words, script='dist_train.sh', **env):
        # torchrun's parser reads its own variables.
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(
            ['bash', str(TOOLS / script), *words],
            env=dict(os.environ, PYTHON=str(fake)),
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        share, option, module, *words = done.stdout.splitlines()
        assert (share, option, module) == ('1', '-m', 'torch.distributed.run')
        return parse_args(words)

    return start


def test_one_machine(start):
    args = start('c.py', '8', '--amp', '--cfg-options', 'a=[1, 2]')
    assert (args.nnodes, args.nproc_per_node) == ('1:1', '8')
    assert (args.rdzv_backend, args.max_restarts) == ('static', 0)
    assert (args.node_rank, args.master_addr, args.master_port) == (
        0,
        '127.0.0.1',
        29500,
    )
    assert args.training_script == str(TOOLS / 'train.py')
    assert args.training_script_args == [
        'c.py',
        '--launcher',
        'pytorch',
        '--amp',
        '--cfg-options',
        'a=[1, 2]',
    ]


@pytest.mark.parametrize(
    'script, words',
    [
        ('dist_train.sh', ['c.py', '4']),
        ('dist_test.sh', ['c.py', 'w.pth', '4']),
    ],
)
def test_several_machines(start, script, words):
    args = start(
        *words,
        script=script,
        NNODES='2',
        NODE_RANK='1',
        MASTER_ADDR='10.0.0.1',
        PORT='1234',
    )
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ('2', 1, '4')
    assert (args.master_addr, args.master_port) == ('10.0.0.1', 1234)
    assert args.rdzv_backend == 'static'
    assert args.training_script_args == [*words[:-1], '--launcher', 'pytorch']


class TestElastic:
    @pytest.mark.parametrize(
        'rank, conf', [('0', 'is_host=1'), ('5', 'is_host=0'), ('', '')]
    )
    def test_ours(self, start, rank, conf):
        args = start(
            'c.py', '8', '--resume', NNODES='2:4', NODE_RANK=rank, **ELASTIC
        )
        assert (args.nnodes, args.max_restarts) == ('2:4', 3)
        assert (args.rdzv_backend, args.rdzv_endpoint, args.rdzv_conf) == (
            'c10d',
            'node7:29400',
            conf,
        )
        assert args.training_script_args[-1] == '--resume'

    def test_both(self, start):
        args = start(
            'c.py',
            '8',
            '--resume',
            NODE_RANK='0',
            PET_RDZV_CONF='join_timeout=60',
            **ELASTIC,
        )
        assert args.rdzv_conf == 'is_host=1,join_timeout=60'

    def test_torchruns_own(self, start):
        """As Kubeflow's operator sets them in each pod."""
        args = start(
            'c.py',
            '8',
            '--resume',
            PET_NNODES='1:4',
            PET_RDZV_BACKEND='c10d',
            PET_RDZV_ENDPOINT='master-0:23456',
            PET_MAX_RESTARTS='7',
        )
        assert (args.nnodes, args.max_restarts) == ('1:4', 7)
        assert (args.rdzv_backend, args.rdzv_endpoint) == (
            'c10d',
            'master-0:23456',
        )

    @pytest.mark.parametrize(
        'flags',
        [
            [],
            ['--resume', 'x.pth'],
            ['--work-dir', 'x', '--resume', 'x.pth', '--amp'],
            ['--cfg-options', 'a=--resume'],
        ],
    )
    @pytest.mark.parametrize(
        'env',
        [
            dict(MAX_RESTARTS='1'),
            dict(RDZV_ENDPOINT='x:1'),
            dict(PET_MAX_RESTARTS='1'),
            dict(PET_RDZV_ENDPOINT='x:1'),
        ],
    )
    def test_would_lose_what_was_done(self, start, flags, env):
        with pytest.raises(SystemExit, match='Give --resume, without a file'):
            start('c.py', '8', *flags, **env)

    @pytest.mark.parametrize(
        'flags',
        [
            ['--resume'],
            ['--resume', '--amp'],
            ['--amp', '--resume'],
        ],
    )
    def test_loses_nothing(self, start, flags):
        args = start('c.py', '8', *flags, **ELASTIC)
        assert args.training_script_args[3:] == flags

    def test_no_restarts(self, start):
        args = start('c.py', '8', PET_MAX_RESTARTS='0')
        assert args.training_script_args[-1] == 'pytorch'


@pytest.mark.parametrize(
    'script, words',
    [
        ('dist_train.sh', ['c.py']),
        ('dist_test.sh', ['c.py', 'w.pth']),
    ],
)
def test_usage(start, script, words):
    with pytest.raises(SystemExit, match='usage: .* GPUS'):
        start(*words, script=script)
