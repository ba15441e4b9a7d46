# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The tools as a user starts them, in processes of their own.

The first run is a process from scratch, and so are those of the launchers;
the others need not import the libraries again.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from runs import (
    SLURM_WORDS,
    TOOLS,
    TORCHRUN_WORDS,
    assert_same_weights,
    final,
    prepare,
    run,
    tool,
    train,
)

from mmdensecl.benchmark.runner import free_port
from mmdensecl.engine import prepare_cpu_launch


@pytest.fixture
def workplace(tmp_path):
    return prepare(tmp_path)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of two epochs: its log and its folder."""
    folder = prepare(tmp_path_factory.mktemp('whole'))
    done = run(
        sys.executable,
        TOOLS / 'train.py',
        'tiny.py',
        '--cfg-options',
        'data_root=pictures',
        cwd=folder,
    )
    return done.stdout, folder / 'work_dirs' / 'tiny'


class TestTrain:
    def test_log_work_dir_and_checkpoints(self, whole):
        log, folder = whole
        assert (folder / 'last_checkpoint').read_text().endswith('epoch_2.pth')
        line = next(x for x in log.splitlines() if '[2][3/3]' in x)
        for name in (
            'lr',
            'eta',
            'time',
            'data_time',
            'loss',
            'loss_global',
            'loss_dense',
            'global_pos_sim',
            'global_neg_sim',
            'global_acc',
            'dense_pos_sim',
            'dense_neg_sim',
            'dense_acc',
            'position_r2',
            'match_coverage',
            'match_acc',
            'feat_std',
            'queue_fill',
        ):
            assert f'{name}: ' in line, name
        state = final(folder)['state_dict']
        # Six batches of four keys, around the end of a queue of 14.
        assert int(state['queue.enqueued']) == 24
        assert state['queue.keys'].shape == (14, 128)

    def test_missing_data_says_what_to_do(self, workplace):
        done = tool('train.py', 'tiny.py', cwd=workplace, check=False)
        assert done.returncode != 0
        last = done.stdout.strip().splitlines()[-1]
        assert '"nowhere" does not exist' in last
        assert '--data-root' in last

    @pytest.mark.parametrize(
        'name, rest', [('train.py', ()), ('test.py', ('x.pth',))]
    )
    def test_a_host_without_its_data(self, workplace, name, rest):
        mini = TOOLS.parent / 'configs/benchmarks/mini'
        config = mini / 'fcn_r18w16-d16_voc.py'
        done = tool(name, config, *rest, cwd=workplace, check=False)
        assert done.returncode == 2
        last = done.stdout.strip().splitlines()[-1]
        assert 'VOC2012" of ' in last and 'does not exist' in last
        assert '--data-root PATH' in last
        assert 'Traceback' not in done.stdout

    def test_amp_and_auto_scale_lr_reach_the_config(
        self, workplace, monkeypatch
    ):
        monkeypatch.syspath_prepend(str(TOOLS))
        monkeypatch.chdir(workplace)
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'train.py',
                'tiny.py',
                '--amp',
                '--auto-scale-lr',
                '--resume',
                'x.pth',
                '--cfg-options',
                'optim_wrapper.optimizer.lr=0.5',
            ],
        )
        import train as module

        cfg = module.build_config(module.parse_args())
        # As is right for a CPU and for today's GPUs.
        assert cfg.optim_wrapper.type == 'mmdensecl.BFloat16OptimWrapper'
        assert cfg.optim_wrapper.optimizer.lr == 0.5
        assert cfg.auto_scale_lr.enable
        assert (cfg.resume, cfg.load_from) == (True, 'x.pth')
        assert cfg.work_dir == os.path.join('work_dirs', 'tiny')

    def test_a_config_that_cannot_be_meant(self, workplace):
        """One line, before anything is trained."""
        (workplace / 'val.py').write_text(
            "_base_ = './tiny.py'\nval_dataloader = dict(batch_size=1)\n"
            'val_cfg = dict()\nval_evaluator = dict()\n'
        )
        (workplace / 'list.py').write_text(
            "_base_ = './tiny.py'\nmodel = dict(backbone=dict("
            "init_cfg=dict(type='Kaiming', layer='Conv2d')))\n"
        )
        for name, answer in (('val', 'KNNHook'), ('list', '[dict(...)]')):
            done = tool(
                'train.py',
                f'{name}.py',
                '--cfg-options',
                'data_root=pictures',
                cwd=workplace,
                check=False,
            )
            assert done.returncode == 2 and 'Traceback' not in done.stdout
            last = done.stdout.strip().splitlines()[-1]
            assert last.startswith('train.py: error: ') and answer in last

    def test_a_loop_by_iterations(self, workplace):
        """Not ours, and custom_hooks replaced: what it needs is there."""
        (workplace / 'iters.py').write_text(
            "_base_ = './tiny.py'\ncustom_hooks = []\n"
            'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=2)\n'
            'optim_wrapper = dict(accumulative_counts=2)\n'
            'auto_scale_lr = dict(base_batch_size=8)\n'
        )
        log = train(workplace, '--auto-scale-lr', config='iters.py').stdout
        for name in ('UnlabeledDataHook', 'ContrastMonitorHook'):
            assert name in log.partition('Added to the hooks')[2]
        # Two iterations of four images are the eight of the config.
        assert 'Scaling the original LR by 1.0.' in log


class TestFast:
    def test_resumed_equals_uninterrupted(self, workplace):
        train(workplace, '--work-dir', 'whole', config='fast.py')
        half = workplace / 'whole' / 'epoch_1.pth'
        train(
            workplace,
            '--work-dir',
            'resumed',
            '--resume',
            half,
            config='fast.py',
            options=['train_dataloader.num_workers=2'],
        )
        assert_same_weights(workplace / 'whole', workplace / 'resumed')
        # A run of the published kind can take it up, too.
        assert '[2][3/3]' in train(workplace, '--resume', half).stdout

    def test_two_processes(self, workplace):
        if torch.cuda.is_available():
            pytest.skip('this machine has GPUs')
        port = str(free_port())
        with ThreadPoolExecutor(2) as pool:
            ranks = [
                pool.submit(
                    train,
                    workplace,
                    '--launcher',
                    'pytorch',
                    config='fast.py',
                    options=['train_dataloader.batch_size=2'],
                    env=dict(
                        RANK=str(rank),
                        LOCAL_RANK=str(rank),
                        WORLD_SIZE='2',
                        MASTER_ADDR='127.0.0.1',
                        MASTER_PORT=port,
                    ),
                )
                for rank in range(2)
            ]
        for rank in ranks:
            rank.result()
        state = final(workplace / 'work_dirs' / 'fast')['state_dict']
        assert int(state['dense_queue.enqueued']) == 24
        assert all(x.isfinite().all() for x in state.values())


class TestLaunchers:
    @pytest.mark.skipif(torch.cuda.is_available(), reason='has GPUs')
    def test_slurm_without_gpus(self):
        cfg = Config(dict(launcher='slurm'))
        with pytest.raises(RuntimeError, match='tools/dist_train.sh'):
            prepare_cpu_launch(cfg)

    def test_two_processes_without_gpus(self, workplace):
        if torch.cuda.is_available():
            pytest.skip('this machine has GPUs')
        port = str(free_port())
        log = run(
            'bash',
            TOOLS / 'dist_train.sh',
            'tiny.py',
            2,
            '--cfg-options',
            'data_root=pictures',
            'train_dataloader.batch_size=2',
            cwd=workplace,
            env=dict(PORT=port),
        ).stdout
        assert '[2][3/3]' in log
        state = final(workplace / 'work_dirs' / 'tiny')['state_dict']
        assert int(state['dense_queue.enqueued']) == 24
        # The permutations' seed and step are saved.
        assert int(state['batch_shuffle._extra_state'][1]) == 6

    def test_dist_train_usage(self, workplace):
        done = run('bash', TOOLS / 'dist_train.sh', cwd=workplace, check=False)
        assert done.returncode == 2 and 'usage' in done.stdout

    def test_dist_train_passes_everything_on(self, workplace):
        fake = workplace / 'fake_python'
        fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        fake.chmod(0o755)
        env = dict(
            NNODES='2', NODE_RANK='1', PORT='1234', MASTER_ADDR='10.0.0.1'
        )
        env['PYTHON'] = str(fake)
        done = subprocess.run(
            [
                'bash',
                str(TOOLS / 'dist_train.sh'),
                'c.py',
                '8',
                '--amp',
                '--cfg-options',
                'a=[1, 2]',
            ],
            env=dict(os.environ, **env),
            text=True,
            capture_output=True,
        )
        words = done.stdout.splitlines()
        assert {*TORCHRUN_WORDS} <= {*words}
        assert words[-6:] == [
            'c.py',
            '--launcher',
            'pytorch',
            '--amp',
            '--cfg-options',
            'a=[1, 2]',
        ]

    def test_slurm_train(self, workplace):
        bin_dir = workplace / 'bin'
        bin_dir.mkdir()
        (bin_dir / 'srun').write_text(
            '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'
        )
        (bin_dir / 'srun').chmod(0o755)
        env = dict(
            PATH=f'{bin_dir}{os.pathsep}{os.environ["PATH"]}',
            GPUS='16',
            SRUN_ARGS='--time=1 --mem=2',
        )
        script = TOOLS / 'slurm_train.sh'
        words = run(
            'bash',
            script,
            'gpu',
            'job',
            'c.py',
            'dir',
            '--resume',
            cwd=workplace,
            env=env,
        ).stdout.splitlines()
        assert {*SLURM_WORDS} <= {*words}
        assert words[-6:] == [
            'c.py',
            '--work-dir',
            'dir',
            '--launcher',
            'slurm',
            '--resume',
        ]
        words = run(
            'bash',
            script,
            'gpu',
            'job',
            'c.py',
            '--resume',
            cwd=workplace,
            env=env,
        ).stdout.splitlines()
        assert words[-4:] == ['c.py', '--launcher', 'slurm', '--resume']


class TestSmallTools:
    def test_print_config(self, workplace):
        out = tool(
            'analysis_tools/print_config.py',
            'tiny.py',
            '--cfg-options',
            'model.queue_len=77',
            'data_root=/x',
            '--save-path',
            'whole.py',
            cwd=workplace,
        ).stdout
        assert "data_root='/x'" in out and 'nowhere' not in out
        assert 'queue_len=77' in out and 'CosineAnnealingLR' in out
        assert 'queue_len=77' in (workplace / 'whole.py').read_text()

    def test_browse_dataset(self, workplace):
        tool(
            'analysis_tools/browse_dataset.py',
            'tiny.py',
            '--show-number',
            2,
            '--cfg-options',
            'data_root=pictures',
            cwd=workplace,
        )
        names = sorted(
            p.name for p in (workplace / 'browse_dataset').iterdir()
        )
        assert names == ['000000.png', '000001.png']

    def test_browse_views_of_the_device(self, workplace):
        for name in ('tiny', 'fast'):
            tool(
                'analysis_tools/browse_dataset.py',
                f'{name}.py',
                '--show-number',
                1,
                '--output-dir',
                name,
                '--cfg-options',
                'data_root=pictures',
                cwd=workplace,
            )
        shown = [
            np.asarray(Image.open(workplace / name / '000000.png'), float)
            for name in ('tiny', 'fast')
        ]
        # Where views are rendered hardly shows.
        assert np.abs(shown[0] - shown[1]).mean() < 1

    def test_shards_train_like_the_folder(self, whole, workplace):
        converter = 'dataset_converters/folder_to_shards.py'
        tool(converter, 'pictures', 'copy', cwd=workplace)
        tool(
            'train.py',
            'tiny.py',
            '--cfg-options',
            'data_root=copy',
            'train_dataloader.dataset.type=mmdensecl.UnlabeledShards',
            cwd=workplace,
        )
        assert_same_weights(whole[1], workplace / 'work_dirs' / 'tiny')
        again = tool(converter, 'pictures', 'copy', cwd=workplace, check=False)
        assert again.returncode == 2 and 'exists already' in again.stdout
