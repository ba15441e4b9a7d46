# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a run is promised, however its config was extended."""

import pytest
import torch
from mmengine.hooks import CheckpointHook, RuntimeInfoHook
from torch.utils.data import BatchSampler

from mmdensecl.engine import (
    BufferedRuntimeInfoHook,
    ContrastMonitorHook,
    FollowConfigHook,
    QueueLengthHook,
    SafeCheckpointHook,
    TerminationHook,
    UnlabeledDataHook,
    protect_run,
)
from mmdensecl.engine.config import ConfigError
from mmdensecl.registry import DATA_SAMPLERS

PROMISED = {BufferedRuntimeInfoHook, ContrastMonitorHook, FollowConfigHook}
PROMISED |= {QueueLengthHook, SafeCheckpointHook, TerminationHook}
PROMISED |= {UnlabeledDataHook}


def kinds(runner):
    return [type(x) for x in runner.hooks]


class TestHooks:
    @pytest.mark.parametrize(
        'text',
        [
            "custom_hooks = [dict(type='EMAHook')]",
            'custom_hooks = []',
            "default_hooks = dict(checkpoint=dict(type='CheckpointHook', "
            'max_keep_ckpts=2))',
            'default_hooks = dict(_delete_=True, logger=dict('
            "type='LoggerHook', interval=1))\ncustom_hooks = []",
        ],
        ids=['EMA', 'none', 'checkpoint', 'default_hooks'],
    )
    def test_they_are_there(self, build, messages, text):
        """By Runner.from_cfg alone, which mmpretrain's tools use, too."""
        runner = build(text)
        runner.train()
        assert {*kinds(runner)} >= PROMISED
        for kind in PROMISED:
            assert kinds(runner).count(kind) == 1
        assert not {CheckpointHook, RuntimeInfoHook} & {*kinds(runner)}
        assert 'EMA' not in text or 'EMAHook' in runner.get_hooks_info()
        added = [x for _, x in messages if 'Added to the hooks' in x]
        assert len(added) == ('custom_hooks' in text)

    def test_the_settings_stay(self, build):
        runner = build(
            "custom_hooks = [dict(type='mmdensecl.ContrastMonitorHook', "
            'interval=7)]\n'
            "default_hooks = dict(checkpoint=dict(type='CheckpointHook', "
            'max_keep_ckpts=1, interval=1))'
        )
        runner.train()
        (monitor,) = (x for x in runner.hooks if hasattr(x, 'min_std'))
        assert monitor.interval == 7
        names = [x.name for x in build.work_dir.glob('*.pth')]
        assert names == ['epoch_2.pth']

    def test_a_run_with_ema_resumes_exactly(self, build):
        """82 of 261 tensors differed."""
        text = "custom_hooks = [dict(type='EMAHook')]"
        whole = build(text)
        whole.train()
        state = whole.model.state_dict()
        resumed = build(text, resume='epoch_1.pth')
        resumed.train()
        for name, x in resumed.model.state_dict().items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, state[name]), name

    def test_a_loss_that_is_not_finite_stops(self, build):
        runner = build(
            'custom_hooks = []\noptim_wrapper = dict(optimizer=dict(lr=1e30))'
        )
        with pytest.raises(FloatingPointError):
            runner.train()

    def test_another_loop_is_told(self, build, messages):
        """Where nothing of ours is asked, the algorithm speaks."""
        text = (
            'custom_hooks = []\n'
            'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=2)'
        )
        build(text).train()
        assert sum('may lack the hooks' in x for _, x in messages) == 1
        del messages[:]
        runner = build(text)
        protect_run(runner)  # as tools/train.py
        protect_run(runner)
        runner.train()
        assert not any('may lack the hooks' in x for _, x in messages)
        assert {*kinds(runner)} >= PROMISED
        assert kinds(runner).count(TerminationHook) == 1


class TestOverrides:
    """One natural line of a child config works, or is answered."""

    @pytest.mark.parametrize('check', [True, False], ids=['tool', 'Runner'])
    def test_no_workers(self, build, check):
        """The base has persistent workers; so may prefetch_factor be."""
        build(
            'train_dataloader = dict(num_workers=0, prefetch_factor=4)',
            check=check,
        ).train()

    def test_workers_keep_their_options(self, build):
        runner = build('train_dataloader = dict(num_workers=1)')
        assert runner.train_dataloader.persistent_workers

    def test_own_batch_sampler(self, build):
        """Of a size that it does not say; half of twelve images fit."""

        class Pairs(BatchSampler):
            def __init__(self, sampler, batch_size):
                super().__init__(sampler, 2, True)
                del self.batch_size

            def __iter__(self):
                indices = [*self.sampler]
                return iter(zip(indices[::2], indices[1::2], strict=True))

            def __len__(self):
                return len(self.sampler) // 2

        DATA_SAMPLERS.register_module(module=Pairs, force=True)
        sampler = dict(type='mmdensecl.Pairs')
        runner = build(
            "model = dict(queue_len='auto')\n"
            'train_dataloader = dict(drop_last=False)',
            **{'train_dataloader.batch_sampler': sampler},
        )
        runner._train_dataloader.pop('drop_last')
        runner.train()
        assert len(runner.model.queue) == 6

    @pytest.mark.parametrize(
        'text, answer',
        [
            (
                'val_dataloader = dict(batch_size=1)\nval_cfg = dict()\n'
                'val_evaluator = dict()',
                'A pre-training has no predictions.*KNNHook',
            ),
            (
                'model = dict(backbone=dict(in_channels=1))',
                'in_channels=1, but the pipeline decodes .* RGB',
            ),
            (
                'train_cfg = dict(by_epoch=False, max_iters=3)',
                'write train_cfg = dict.*_delete_=True, by_epoch=False',
            ),
        ],
        ids=['val', 'grey', 'iterations'],
    )
    def test_refused_at_the_start(self, build, text, answer):
        with pytest.raises(ConfigError, match=answer):
            build(text).train()

    def test_by_epoch_is_what_the_loop_does(self, build):
        runner = build('train_cfg = dict(by_epoch=True, max_epochs=1)')
        runner.train()
        assert runner.iter == 3 and runner.epoch == 1


class TestAccumulation:
    TEXT = 'optim_wrapper = dict(accumulative_counts=3)\n'

    def test_auto_scale_lr(self, build, messages):
        """4 images in each of 3 iterations are the 12 it was meant for."""
        scale = 'auto_scale_lr = dict(enable=True, base_batch_size=12)'
        rates = []
        for text in (self.TEXT, ''):
            runner = build(f'{text}{scale}')
            runner.train()
            rates.append(runner.optim_wrapper.param_groups[0]['initial_lr'])
        assert rates == pytest.approx([0.03, 0.01])
        assert any('accumulative_counts' in x for _, x in messages)

    def test_key_encoder_moves_once_a_step(self, build, messages):
        moved = []
        runner = build(f'{self.TEXT}model = dict(momentum=0.5)')
        encoder = runner.model.encoder_k
        update = encoder.update

        def watch(*modules):
            with torch.no_grad():  # away from the query encoder
                next(encoder.parameters()).add_(1)
            before = next(encoder.parameters()).clone()
            update(*modules)
            moved.append(not torch.equal(before, next(encoder.parameters())))

        encoder.update = watch
        runner.train()
        assert moved == [True, False, False] * 2
        assert int(runner.model.queue.enqueued) == 24
        assert sum('moves once a step' in x for _, x in messages) == 1
