# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A resumed run follows its config, and says where that is new."""

import re
from shutil import copytree

import pytest
import torch
from mmengine.optim import OptimWrapperDict

from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import protect_run
from mmdensecl.engine.resume import ResumeError
from mmdensecl.testing import write_pictures

ITERS = 3  # of an epoch
POLY = "param_scheduler = dict(_delete_=True, type='PolyLR', {})\n"
BY_ITERATION = 'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=4)\n'


@pytest.fixture
def rates(logged):
    """Function that trains and gives the learning rates, by iteration."""

    def rates(runner):
        runner.train()
        return {step: x['lr'] for step, x in logged(runner).items()}

    return rates


def after(iteration, values):
    return {k: v for k, v in values.items() if k > iteration}


@pytest.fixture
def edit(build):
    """Function that changes the first checkpoint of a run, once trained."""

    def edit(function):
        build().train()
        path = build.work_dir / 'epoch_1.pth'
        checkpoint = load_from_local(path)
        function(checkpoint)
        torch.save(checkpoint, path)
        return str(path)

    return edit


class TestSchedule:
    LONGER = 'train_cfg = dict(max_epochs=4)\n'

    @pytest.mark.parametrize(
        'schedule',
        [
            '',
            'param_scheduler = dict(T_max=4)',
            "param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=5,"
            " by_epoch=False), dict(type='CosineAnnealingLR', begin=1)]",
            POLY.format('end=4, convert_to_iter_based=True'),
            "param_scheduler = dict(_delete_=True, type='MultiStepLR',"
            ' milestones=[1, 3])',
        ],
        ids=['derived', 'T_max', 'warm-up', 'by iteration', 'type'],
    )
    def test_longer(self, build, rates, warned, messages, schedule):
        """Epochs 3 and 4 have the rates that the config says."""
        whole = build(self.LONGER + schedule)
        expected = rates(whole)
        build().train()
        messages.clear()
        resumed = build(self.LONGER + schedule, resume='epoch_2.pth')
        assert rates(resumed) == after(2 * ITERS, expected)
        assert len(warned('The config differs')) == 1
        states = [
            [x.state_dict() for x in run.param_schedulers]
            for run in (whole, resumed)
        ]
        assert states[0] == states[1]

    def test_the_difference_is_named_once(self, build, warned, messages):
        build().train()
        build(self.LONGER, resume='epoch_1.pth').train()
        (message,) = warned('The config differs')
        assert 'CosineAnnealingLR.T_max: 4, was 2' in message
        assert 'CosineAnnealingLR.end: 4, was 2' in message
        assert 'at iteration 3' in message and '(lr 0.0256' in message
        messages.clear()
        again = build(self.LONGER, resume='epoch_3.pth')
        again.train()
        assert not warned('The config differs') and again.iter == 12
        build(self.LONGER, resume='epoch_4.pth').train()
        (message,) = warned('nothing is left to train')
        assert 'All 12 iterations' in message

    def test_past_metrics(self, build):
        """What cannot be computed anew is refused."""
        plateau = (
            "param_scheduler = dict(_delete_=True, type='ReduceOnPlateauLR',"
            " monitor='loss')"
        )
        build().train()
        with pytest.raises(ResumeError, match='depends on past metrics'):
            build(plateau, resume='epoch_1.pth').train()


class TestOptimiser:
    def test_settings(self, build, warned, rates):
        build().train()
        changed = (
            'optim_wrapper = dict(optimizer=dict('
            'weight_decay=0.01, momentum=0.5, lr=0.1, nesterov=True))'
        )
        runner = build(changed, resume='epoch_1.pth')
        assert rates(runner)[4] == pytest.approx(0.05)
        group = runner.optim_wrapper.param_groups[0]
        assert (group['weight_decay'], group['momentum']) == (0.01, 0.5)
        assert group['nesterov'] and group['initial_lr'] == 0.1
        (message,) = warned('The config differs')
        for text in (
            'weight_decay: 0.01, was 0.0001',
            'momentum: 0.5, was 0.9',
            'lr: 0.1, was 0.03',
            'nesterov: True, was False',
        ):
            assert text in message
        # And its state is the checkpoint's.
        saved = load_from_local(build.work_dir / 'epoch_1.pth')['optimizer']
        state = runner.optim_wrapper.state_dict()['state']
        assert len(saved['state']) == len(state)

    @pytest.mark.parametrize(
        'text, reason',
        [
            (
                "optimizer=dict(_delete_=True, type='AdamW', lr=0.001)",
                'config has AdamW, and the checkpoint .* another optimiser',
            ),
            (
                'paramwise_cfg=dict(norm_decay_mult=0.)',
                'parameter groups, the config builds',
            ),
        ],
        ids=['optimiser', 'groups'],
    )
    def test_refused(self, build, text, reason):
        build().train()
        runner = build(f'optim_wrapper = dict({text})', resume='epoch_1.pth')
        with pytest.raises(ResumeError, match=f'{reason}.*load_from=FILE'):
            runner.train()

    @pytest.mark.parametrize(
        'wrong',
        ['text', torch.ones(1), torch.ones(4, 3, 7, 7, dtype=torch.int8)],
        ids=['text', 'shape', 'int8'],
    )
    def test_state_of_another_kind(self, build, edit, wrong):

        def spoil(checkpoint):
            state = checkpoint['optimizer']['state'][0]
            assert state['momentum_buffer'].shape == (4, 3, 7, 7)
            state['momentum_buffer'] = wrong

        edit(spoil)
        with pytest.raises(ResumeError, match='momentum_buffer of the opt'):
            build(resume='epoch_1.pth').train()


class TestModel:
    """What loads, but computes otherwise, is named."""

    @pytest.mark.parametrize(
        'text, named',
        [
            ('', None),
            (
                "model = dict(backbone=dict(init_cfg=[dict(type='Normal')]))",
                None,
            ),
            (
                'model = dict(momentum=0.5)',
                'model.momentum: 0.5, was 0.001.',
            ),
            (
                'model = dict(backbone=dict(strides=[1, 2, 1, 2], '
                'conv_cfg=dict(type="Conv2d", padding_mode="reflect")))',
                "model.backbone.conv_cfg.padding_mode: 'reflect', was unset; "
                "model.backbone.conv_cfg.type: 'Conv2d', was unset; "
                'model.backbone.strides: [1, 2, 1, 2], was [1, 1, 1, 2].',
            ),
            (
                'model = dict(data_preprocessor=dict(mean=[0, 0, 0]))',
                'model.data_preprocessor.mean: [0, 0, 0], was [123.675, ',
            ),
            (
                "_base_ = './base.py'\n"
                'p = _base_.train_dataloader.dataset.pipeline\n'
                "p[1]['size'] = 64\n"
                'train_dataloader = dict(dataset=dict(pipeline=p))\ndel p',
                'train_dataloader.dataset.pipeline.1.size: 64, was 32.',
            ),
        ],
        ids=['same', 'start', 'momentum', 'backbone', 'mean', 'pipeline'],
    )
    def test_named(self, build, warned, text, named):
        build().train()
        build(text, resume='epoch_1.pth').train()
        found = warned('The model or the train pipeline differs')
        assert len(found) == (named is not None)
        assert all(f'followed: {named}' in x for x in found)


class Wrapped(OptimWrapperDict):
    """As a model with a train_step of its own would use several."""

    def optim_context(self, model):
        return self['all'].optim_context(model)

    def update_params(self, loss):
        self['all'].update_params(loss)


def test_several_optimisers(build, warned):
    """Nothing is compared, and a run that resumes says so."""
    for resume in (None, 'epoch_1.pth'):
        runner = build(resume=resume)
        wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.optim_wrapper = Wrapped(all=wrapper)
        runner.train()
        assert runner.iter == 6
        assert len(warned('several optimisers')) == (resume is not None)


STEM, HEAD = 'backbone.conv1.weight', 'neck.mlp.0.weight'


class TestWeights:
    """The type of every tensor is part of 'loaded'."""

    @pytest.mark.parametrize(
        'name, spoil, got',
        [
            (STEM, lambda x: 'text', 'got str'),
            (STEM, lambda x: x.to(torch.int8), 'int8, expected .* float32'),
            (STEM, lambda x: x.to(torch.complex64), 'complex64, expected'),
            (STEM, lambda x: x.to_sparse(), 'sparse_coo'),
            (STEM, lambda x: x[:1], r'got \(1, 3, 7, 7\), expected \(4, 3'),
            # Torch would cast it: no head 'as initialised', but a ruined one.
            (HEAD, lambda x: x.bool(), 'bool, expected'),
        ],
    )
    def test_refused(self, build, edit, name, spoil, got):

        def change(checkpoint):
            state = checkpoint['state_dict']
            state[name] = spoil(state[name])

        path = edit(change)
        for source in (dict(resume='epoch_1.pth'), dict(load_from=path)):
            with pytest.raises(ValueError, match=f'{name}: .*{got}'):
                build(**source).train()

    def test_another_precision_is_no_other_kind(self, build, edit):

        def convert(checkpoint):
            state = checkpoint['state_dict']
            for name, x in state.items():
                skipped = name.endswith(('_extra_state', 'ptr'))
                if torch.is_tensor(x) and not skipped:
                    state[name] = (
                        x.double() if x.is_floating_point() else x.int()
                    )

        edit(convert)
        build(resume='epoch_1.pth').train()


class TestData:
    def test_the_folder_grew(self, build, warned, tmp_path):
        """At the end of an epoch, where nothing starts again, as well."""
        write_pictures(tmp_path / 'more', 20)
        build().train()
        dataset = f"dict(data_root='{tmp_path}/more')"
        more = f'train_dataloader = dict(dataset={dataset})'
        runner = build(more, resume='epoch_1.pth')
        runner.train()
        (message,) = warned('resumes, but not')
        assert 'images: 20, was 12' in message
        assert 'batches: 5, was 3' in message
        assert runner.iter == 10

    @pytest.mark.parametrize('renamed', [False, True])
    def test_other_images_of_the_same_number(
        self, build, warned, tmp_path, pictures, renamed
    ):
        """One was renamed, or the whole folder moved."""
        build().train()
        copytree(pictures, tmp_path / 'moved')
        if renamed:
            first = min((tmp_path / 'moved').iterdir())
            first.rename(first.with_stem('zzz'))
        dataset = f"dict(data_root='{tmp_path}/moved')"
        moved = f'train_dataloader = dict(dataset={dataset})'
        build(moved, resume='epoch_1.pth').train()
        found = warned('resumes, but not')
        assert len(found) == renamed
        assert all(
            re.search(r'\(image_names: \w{8}, was \w{8}\)', x) for x in found
        )

    def test_a_schedule_by_iteration_follows(self, build, rates):
        """A smaller batch: twice the iterations, the same curve."""
        text = POLY.format('convert_to_iter_based=True')
        smaller = f'{text}train_dataloader = dict(batch_size=2)'
        expected = rates(build(smaller))
        build(text).train()
        found = rates(build(smaller, resume='epoch_1.pth'))
        assert found == after(6, expected)

    def test_of_an_epoch_behind_its_last_iteration(
        self, build, warned, messages, rates
    ):
        """Saved there by iteration, its end is still to come."""
        by_iteration = (
            'default_hooks = dict(checkpoint=dict(by_epoch=False, interval=3))'
        )
        build(by_iteration).train()
        messages.clear()
        longer = f'{by_iteration}\ntrain_cfg = dict(max_epochs=3)'
        found = rates(build(longer, resume='iter_6.pth'))
        (message,) = warned('The config differs')
        assert f'(lr {found[7]:g})' in message
        assert not warned('The learning rate ends')


class TestEnd:
    """One warning where the last learning rate is not small."""

    @pytest.mark.parametrize(
        'text, told',
        [
            ('param_scheduler = dict(T_max=200)', True),
            (
                'train_cfg = dict(max_epochs=5)\n'
                'param_scheduler = dict(T_max=2)',  # climbs again
                True,
            ),
            (BY_ITERATION, True),
            (f'{BY_ITERATION}param_scheduler = dict(by_epoch=False)', False),
            ('', False),
            ('param_scheduler = []', False),
            (
                "param_scheduler = dict(_delete_=True, type='MultiStepLR',"
                ' milestones=[1])',
                False,
            ),
        ],
    )
    def test_told(self, build, warned, text, told):
        runner = build(text)
        protect_run(runner)
        runner.train()
        found = warned('The learning rate ends at')
        assert len(found) == told
        assert all('at 100%' in x for x in found)
        assert all('follows train_cfg' in x for x in found)
