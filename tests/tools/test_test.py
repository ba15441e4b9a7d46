# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""tools/test.py and its launchers, in processes of their own.

What it does with each kind of config is tested, without processes, in
tests/configs/test_mmpretrain_benchmarks.py.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SLURM_WORDS, TORCHRUN_WORDS

from mmdensecl.benchmark.runner import free_port
from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'

CONFIG = f"""
_base_ = '{ROOT}/configs/benchmarks/mmpretrain/resnet50_knn_in1k.py'
data_root = 'nowhere'
model = dict(backbone=dict(
    depth=18, stem_channels=4, base_channels=4, strides=(1, 1, 1, 2)))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs')]
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(
    data_root=data_root, classes=['a', 'b'], pipeline=pipeline))
test_cfg = dict(ks=(1, 5), train_dataloader=dict(
    batch_size=3, num_workers=0, dataset=dict(
        data_root=data_root, classes=['a', 'b'], pipeline=pipeline)))
"""


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """13 and 7 pictures, so that two ranks get a repeated one each."""
    folder = tmp_path_factory.mktemp('test')
    for split, counts in (('train', (6, 7)), ('val', (4, 3))):
        for seed, (name, count) in enumerate(zip('ab', counts, strict=True)):
            write_pictures(
                folder / 'pictures' / split / name, count, seed=seed
            )
    (folder / 'knn.py').write_text(CONFIG)
    return folder


def run(*command, cwd, env=None):
    env = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        PYTHON=sys.executable,
        OMP_NUM_THREADS='1',
        **(env or {}),
    )
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        timeout=300,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def tool(monkeypatch, workplace):
    """tools/test.py as a module, and a function that sets its arguments."""
    spec = importlib.util.spec_from_file_location(
        'test_tool', TOOLS / 'test.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(workplace)
    return module, lambda *argv: monkeypatch.setattr(
        sys, 'argv', ['test.py', *argv]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='has GPUs')
def test_two_ranks_measure_what_one_does(workplace, tool):
    flags = ['--cfg-options', 'data_root=pictures']
    module, call_with = tool
    call_with('knn.py', 'none', '--out', 'one.json', *flags)
    module.main()
    port = str(free_port())
    done = run(
        'bash',
        TOOLS / 'dist_test.sh',
        'knn.py',
        'none',
        2,
        '--work-dir',
        'two',
        '--out',
        'two.json',
        *flags,
        cwd=workplace,
        env=dict(PORT=port),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'fitting to 13 training images' in done.stdout
    one, two = (
        json.loads((workplace / f'{name}.json').read_text())
        for name in ('one', 'two')
    )
    assert one == pytest.approx(two)
    assert one['knn_1/top1'] == 100  # each val picture is in train
    (written,) = (workplace / 'two').glob('*/[0-9]*.json')
    assert json.loads(written.read_text()) == pytest.approx(two)


class TestArguments:
    @pytest.fixture
    def read(self, tool):
        """Function that reads a command line, no more."""
        module, call_with = tool

        def read(*argv):
            call_with(*argv)
            return module.build_config(module.parse_args())

        return read

    @pytest.mark.parametrize('argv', [['w.pth'], ['--pretrained', 'w.pth']])
    def test_probe_reads_weights(self, read, argv):
        cfg = read('knn.py', *argv)
        assert cfg.model.backbone.init_cfg.checkpoint == 'w.pth'
        assert cfg.get('load_from') is None
        assert cfg.work_dir == os.path.join('work_dirs', 'knn')

    @pytest.mark.parametrize('weights', ['w.pth', 'none'])
    @pytest.mark.parametrize(
        'other',
        [
            'load_from=y.pth',
            'model.pretrained=y.pth',
            'model.init_cfg.type=Pretrained',
        ],
    )
    def test_no_other_weights_for_a_probe(self, read, weights, other):
        with pytest.raises(ValueError, match=f'{weights} would be overwritt'):
            read('knn.py', weights, '--cfg-options', other)

    def test_pinned_weights_stay_pinned(self, read, workplace):
        """So does the benchmark plan its probes."""
        (workplace / 'pinned.py').write_text(
            "_base_ = 'knn.py'\nmodel = dict(backbone=dict(init_cfg=dict("
            "checkpoint='w.pth', sha256='0123abcd')))"
        )
        pinned = read('pinned.py', 'w.pth').model.backbone.init_cfg
        assert pinned.sha256 == '0123abcd'
        other = read('pinned.py', 'v.pth').model.backbone.init_cfg
        assert 'sha256' not in other

    def test_random_weights(self, read):
        assert 'init_cfg' not in read('knn.py', 'none').model.backbone

    def test_model_loads_its_checkpoint(self, read):
        config = (
            'configs/benchmarks/mmpretrain/'
            'resnet50_8xb32-steplr-100e_in1k_linear.py'
        )
        cfg = read(str(ROOT / config), 'epoch_100.pth')
        assert cfg.load_from == 'epoch_100.pth'
        assert cfg.custom_hooks[-1].type == 'mmdensecl.CheckpointKeysHook'
        with pytest.raises(ValueError, match='is no probe: train it'):
            read(str(ROOT / config), '--pretrained', 'w.pth')

    def test_pre_training_has_no_test(self, read):
        config = str(ROOT / 'configs/densecl_r50_8xb32-coslr-200e.py')
        with pytest.raises(ValueError, match='no test_dataloader'):
            read(config, 'w.pth')

    @pytest.mark.parametrize(
        'argv, message',
        [
            ([], 'give a checkpoint'),
            (['w.pth', '--pretrained', 'w.pth'], 'give a checkpoint, once'),
            (['w.pth', '--out', 'm.pkl'], 'must end in .json'),
        ],
    )
    def test_unclear_command_lines(self, read, capsys, argv, message):
        with pytest.raises(SystemExit):
            read('knn.py', *argv)
        assert message in capsys.readouterr().err


class TestLaunchers:
    @pytest.fixture
    def fakes(self, tmp_path):
        """Environment in which srun and python print their arguments."""
        fake = tmp_path / 'srun'
        fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        fake.chmod(0o755)
        shutil.copy(fake, tmp_path / 'fake_python')
        return dict(
            PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}',
            FAKE_PYTHON=str(tmp_path / 'fake_python'),
        )

    def test_dist_test(self, fakes, tmp_path):
        done = subprocess.run(
            [
                'bash',
                str(TOOLS / 'dist_test.sh'),
                'c.py',
                'w.pth',
                '8',
                '--out',
                'm n.json',
            ],
            env=dict(
                os.environ,
                PYTHON=fakes['FAKE_PYTHON'],
                NNODES='2',
                NODE_RANK='1',
                PORT='1234',
                MASTER_ADDR='10.0.0.1',
            ),
            text=True,
            capture_output=True,
        )
        words = done.stdout.splitlines()
        assert {*TORCHRUN_WORDS} <= {*words}
        assert words[-7:] == [
            str(TOOLS / 'test.py'),
            'c.py',
            'w.pth',
            '--launcher',
            'pytorch',
            '--out',
            'm n.json',
        ]

    def test_slurm_test(self, fakes, tmp_path):
        env = dict(fakes, GPUS='16', SRUN_ARGS='--time=1 --mem=2')
        done = run(
            'bash',
            TOOLS / 'slurm_test.sh',
            'gpu',
            'job',
            'c.py',
            'w.pth',
            '--out',
            'm.json',
            cwd=tmp_path,
            env=env,
        )
        words = done.stdout.splitlines()
        assert {*SLURM_WORDS} <= {*words}
        assert words[-7:] == [
            str(TOOLS / 'test.py'),
            'c.py',
            'w.pth',
            '--launcher',
            'slurm',
            '--out',
            'm.json',
        ]

    @pytest.mark.parametrize(
        'script, count', [('dist_test.sh', 2), ('slurm_test.sh', 3)]
    )
    def test_usage(self, tmp_path, script, count):
        done = run('bash', TOOLS / script, *['x'] * count, cwd=tmp_path)
        assert done.returncode == 2 and 'usage' in done.stdout
