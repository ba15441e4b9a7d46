# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What tools/dist_*.sh and slurm_*.sh start; nothing is started here.

Real runs are in tests/distributed/test_two_nodes.py and test_resume.py.
"""

import os
import subprocess

import pytest
from runs import TOOLS
from torch.distributed.run import parse_args

ELASTIC = dict(RDZV_ENDPOINT='node7:29400', MAX_RESTARTS='3')
NODE = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='1234')


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Function that gives the words that python or srun would be given."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text(
            '#!/usr/bin/env bash\n'
            'printf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"\n'
        )
        (tmp_path / name).chmod(0o755)
    for name in (*NODE, *ELASTIC):
        monkeypatch.delenv(name, raising=False)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'

    def call(script, *words, **env):
        # torchrun's parser reads its own variables.
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(
            ['bash', str(TOOLS / script), *words],
            env=dict(os.environ, PATH=path, PYTHON=str(tmp_path / 'python')),
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return done.stdout.splitlines()

    return call


@pytest.fixture
def start(call):
    """Function that gives what torchrun would be asked."""

    def start(*words, script='dist_train.sh', **env):
        share, option, module, *words = call(script, *words, **env)
        assert (share, option, module) == ('1', '-m', 'torch.distributed.run')
        return parse_args(words)

    return start


def test_one_machine(start):
    words = ['--amp', '--cfg-options', 'a=[1, 2]']
    args = start('c.py', '8', *words)
    assert (args.nnodes, args.nproc_per_node) == ('1:1', '8')
    assert (args.rdzv_backend, args.max_restarts) == ('static', 0)
    place = args.node_rank, args.master_addr, args.master_port
    assert place == (0, '127.0.0.1', 29500)
    assert args.training_script == str(TOOLS / 'train.py')
    given = args.training_script_args
    assert given == ['c.py', '--launcher', 'pytorch', *words]


@pytest.mark.parametrize(
    'script, words', [('train', ['c.py']), ('test', ['c.py', 'w.pth'])]
)
def test_several_machines(start, script, words):
    args = start(*words, '4', '--x', script=f'dist_{script}.sh', **NODE)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ('2', 1, '4')
    assert (args.master_addr, args.master_port) == ('10.0.0.1', 1234)
    assert args.rdzv_backend == 'static'
    assert args.training_script == str(TOOLS / f'{script}.py')
    given = args.training_script_args
    assert given == [*words, '--launcher', 'pytorch', '--x']


@pytest.mark.parametrize(
    'script, words, given',
    [
        ('train', 'c.py dir --resume', 'c.py --work-dir dir {} --resume'),
        ('train', 'c.py --resume', 'c.py {} --resume'),
        ('test', 'c.py w.pth --out m.json', 'c.py w.pth {} --out m.json'),
    ],
)
def test_slurm(call, script, words, given):
    env = dict(GPUS='16', SRUN_ARGS='--time=1 --mem=2')
    asked = call(f'slurm_{script}.sh', 'gpu', 'job', *words.split(), **env)
    assert {
        'gpu',
        '--job-name=job',
        '--ntasks=16',
        '--ntasks-per-node=8',
        '--gres=gpu:8',
        '--time=1',
        '--mem=2',
    } <= {*asked}
    given = given.format('--launcher slurm').split()
    assert asked[-len(given) - 1 :] == [str(TOOLS / f'{script}.py'), *given]


class TestElastic:
    @pytest.mark.parametrize(
        'rank, conf', [('0', 'is_host=1'), ('5', 'is_host=0'), ('', '')]
    )
    def test_ours(self, start, rank, conf):
        env = dict(ELASTIC, NNODES='2:4', NODE_RANK=rank)
        args = start('c.py', '8', '--resume', **env)
        assert (args.nnodes, args.max_restarts) == ('2:4', 3)
        meeting = args.rdzv_backend, args.rdzv_endpoint, args.rdzv_conf
        assert meeting == ('c10d', 'node7:29400', conf)
        assert args.training_script_args[-1] == '--resume'

    def test_torchruns_own(self, start):
        """As Kubeflow's operator sets them in each pod."""
        own = dict(NNODES='1:4', RDZV_BACKEND='c10d', MAX_RESTARTS='7')
        own['RDZV_ENDPOINT'] = 'master-0:23456'
        own = {f'PET_{name}': value for name, value in own.items()}
        args = start('c.py', '8', '--resume', **own)
        assert (args.nnodes, args.max_restarts) == ('1:4', 7)
        meeting = args.rdzv_backend, args.rdzv_endpoint
        assert meeting == ('c10d', 'master-0:23456')
        both = dict(ELASTIC, NODE_RANK='0', PET_RDZV_CONF='join_timeout=60')
        args = start('c.py', '8', '--resume', **both)
        assert args.rdzv_conf == 'is_host=1,join_timeout=60'

    @pytest.mark.parametrize(
        'words, variable',
        [
            ('', 'MAX_RESTARTS'),
            ('--resume x.pth', 'RDZV_ENDPOINT'),
            ('--work-dir x --resume x.pth --amp', 'PET_MAX_RESTARTS'),
            ('--cfg-options a=--resume', 'PET_RDZV_ENDPOINT'),
        ],
    )
    def test_would_lose_what_was_done(self, start, words, variable):
        with pytest.raises(SystemExit, match='Give --resume, without a file'):
            start('c.py', '8', *words.split(), **{variable: '1'})

    def test_loses_nothing(self, start):
        args = start('c.py', '8', '--amp', '--resume', **ELASTIC)
        assert args.training_script_args[3:] == ['--amp', '--resume']
