# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A resumed run follows its config, and says where that is new."""

import pytest
import torch

from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import protect_run
from mmdensecl.engine.resume import ResumeError
from mmdensecl.testing import write_pictures

ITERS = 3  # of an epoch


def rates(lines):
    return {step: x['lr'] for step, x in lines.items()}


def group_of(runner):
    return runner.optim_wrapper.param_groups[0]


def told(messages, text='The config differs'):
    return [x for level, x in messages if level == 'WARNING' and text in x]


@pytest.fixture
def edit(build):
    """Function that changes a checkpoint of the run."""

    def change(name, function):
        path = build.work_dir / name
        checkpoint = load_from_local(path)
        function(checkpoint)
        torch.save(checkpoint, path)

    return change


class TestSchedule:
    LONGER = 'train_cfg = dict(max_epochs=4)\n'

    @pytest.mark.parametrize(
        'schedule',
        [
            '',
            'param_scheduler = dict(T_max=4)',
            "param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=5,"
            " by_epoch=False), dict(type='CosineAnnealingLR', begin=1)]",
            "param_scheduler = dict(_delete_=True, type='PolyLR', end=4,"
            ' convert_to_iter_based=True)',
            "param_scheduler = dict(_delete_=True, type='MultiStepLR',"
            ' milestones=[1, 3])',
        ],
        ids=['derived', 'T_max', 'warm-up', 'by iteration', 'type'],
    )
    def test_longer(self, build, logged, messages, schedule):
        """Epochs 3 and 4 have the rates that the config says."""
        whole = build(self.LONGER + schedule)
        whole.train()
        expected = rates(logged(whole))
        build().train()
        del messages[:]
        resumed = build(self.LONGER + schedule, resume='epoch_2.pth')
        resumed.train()
        assert rates(logged(resumed)) == {
            step: lr for step, lr in expected.items() if step > 2 * ITERS
        }
        assert len(told(messages)) == 1
        states = [
            [x.state_dict() for x in run.param_schedulers]
            for run in (whole, resumed)
        ]
        assert states[0] == states[1]

    def test_the_difference_is_named(self, build, messages):
        build().train()
        build(self.LONGER, resume='epoch_1.pth').train()
        (message,) = told(messages)
        assert 'CosineAnnealingLR.T_max: 4, was 2' in message
        assert 'CosineAnnealingLR.end: 4, was 2' in message
        assert 'at iteration 3' in message and '(lr 0.0256' in message

    def test_resumed_twice(self, build, logged, messages):
        """The second time nothing is new."""
        build().train()
        build(self.LONGER, resume='epoch_2.pth').train()
        del messages[:]
        again = build(self.LONGER, resume='epoch_3.pth')
        again.train()
        assert not told(messages)
        assert set(rates(logged(again))) == {10, 11, 12}

    def test_the_same_config_says_nothing(self, build, messages):
        build().train()
        del messages[:]
        build(resume='epoch_1.pth').train()
        assert not told(messages)

    def test_past_metrics(self, build):
        """What cannot be computed anew is refused."""
        plateau = (
            "param_scheduler = dict(_delete_=True, type='ReduceOnPlateauLR',"
            " monitor='loss')"
        )
        build().train()
        with pytest.raises(ResumeError, match='depends on past metrics'):
            build(plateau, resume='epoch_1.pth').train()

    def test_nothing_left(self, build, messages):
        build().train()
        build(resume='epoch_2.pth').train()
        (message,) = told(messages, 'nothing is left to train')
        assert 'All 6 iterations' in message


class TestOptimiser:
    def test_settings(self, build, messages, logged):
        build().train()
        changed = (
            'optim_wrapper = dict(optimizer=dict('
            'weight_decay=0.01, momentum=0.5, lr=0.1, nesterov=True))'
        )
        runner = build(changed, resume='epoch_1.pth')
        runner.train()
        group = group_of(runner)
        assert (group['weight_decay'], group['momentum']) == (0.01, 0.5)
        assert group['nesterov'] and group['initial_lr'] == 0.1
        assert rates(logged(runner))[4] == pytest.approx(0.05)
        (message,) = told(messages)
        for text in (
            'weight_decay: 0.01, was 0.0001',
            'momentum: 0.5, was 0.9',
            'lr: 0.1, was 0.03',
            'nesterov: True, was False',
        ):
            assert text in message
        # And its state is the checkpoint's.
        saved = load_from_local(build.work_dir / 'epoch_1.pth')['optimizer']
        assert len(saved['state']) == len(
            runner.optim_wrapper.state_dict()['state']
        )

    def test_constant_rate(self, build, logged):
        none = 'param_scheduler = []'
        build(none).train()
        runner = build(
            f'{none}\noptim_wrapper = dict(optimizer=dict(lr=0.1))',
            resume='epoch_1.pth',
        )
        runner.train()
        assert rates(logged(runner)) == {4: 0.1, 5: 0.1, 6: 0.1}

    @pytest.mark.parametrize(
        'text, reason',
        [
            (
                'optim_wrapper = dict(optimizer=dict(_delete_=True, '
                "type='AdamW', lr=0.001))",
                'config has AdamW, and the checkpoint .* another optimiser',
            ),
            (
                'optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.))',
                'parameter groups, the config builds',
            ),
        ],
        ids=['optimiser', 'groups'],
    )
    def test_refused(self, build, text, reason):
        build().train()
        with pytest.raises(ResumeError, match=f'{reason}.*load_from=FILE'):
            build(text, resume='epoch_1.pth').train()

    @pytest.mark.parametrize(
        'wrong',
        ['text', torch.ones(1), torch.ones(4, 3, 7, 7, dtype=torch.int8)],
        ids=['text', 'shape', 'int8'],
    )
    def test_state_of_another_kind(self, build, edit, wrong):
        build().train()

        def spoil(checkpoint):
            state = checkpoint['optimizer']['state'][0]
            assert state['momentum_buffer'].shape == (4, 3, 7, 7)
            state['momentum_buffer'] = wrong

        edit('epoch_1.pth', spoil)
        with pytest.raises(ResumeError, match='momentum_buffer of the opt'):
            build(resume='epoch_1.pth').train()


class TestWeights:
    """The type of every tensor is part of 'loaded'."""

    @pytest.mark.parametrize(
        'spoil, got',
        [
            (lambda x: 'text', 'got str'),
            (lambda x: x.to(torch.int8), 'int8, expected .* float32'),
            (lambda x: x.bool(), 'bool, expected'),
            (lambda x: x.to(torch.complex64), 'complex64, expected'),
            (lambda x: x.to_sparse(), 'sparse_coo'),
            (lambda x: x.to('meta'), 'meta'),
            (lambda x: x[:1], r'got \(1, 3, 7, 7\), expected \(4, 3'),
        ],
    )
    @pytest.mark.parametrize('resume', [True, False])
    def test_refused(self, build, edit, spoil, got, resume):
        build().train()
        name = 'backbone.conv1.weight'

        def change(checkpoint):
            state = checkpoint['state_dict']
            state[name] = spoil(state[name])

        edit('epoch_1.pth', change)
        runner = build(resume='epoch_1.pth')
        if not resume:
            runner = build(load_from=str(build.work_dir / 'epoch_1.pth'))
        with pytest.raises(ValueError, match=f'{name}: .*{got}'):
            runner.train()

    def test_a_head_is_no_exception(self, build, edit):
        """Torch would cast it: no head 'as initialised', but a ruined one."""
        build().train()
        name = 'neck.mlp.0.weight'

        def change(checkpoint):
            state = checkpoint['state_dict']
            assert name in state
            state[name] = state[name].to(torch.int8)

        edit('epoch_1.pth', change)
        path = str(build.work_dir / 'epoch_1.pth')
        with pytest.raises(ValueError, match=f'{name}: got .*int8'):
            build(load_from=path).train()

    def test_another_precision_is_no_other_kind(self, build, edit):
        build().train()
        edit(
            'epoch_1.pth',
            lambda x: x['state_dict'].update(
                {
                    k: v.double() if v.is_floating_point() else v.int()
                    for k, v in x['state_dict'].items()
                    if torch.is_tensor(v)
                    and not k.endswith(('_extra_state', 'ptr'))
                }
            ),
        )
        build(resume='epoch_1.pth').train()


class TestData:
    def test_the_folder_grew(self, build, messages, pictures, tmp_path):
        """At the end of an epoch, where nothing starts again, as well."""
        write_pictures(tmp_path / 'more', 20)
        build().train()
        more = (
            'train_dataloader = dict(dataset=dict('
            f"data_root='{tmp_path}/more'))"
        )
        runner = build(more, resume='epoch_1.pth')
        runner.train()
        (message,) = told(messages, 'resumes, but not')
        assert 'images: 20, was 12' in message
        assert 'batches: 5, was 3' in message
        assert runner.iter == 10

    def test_a_schedule_by_iteration_follows(self, build, tmp_path, logged):
        """A smaller batch: twice the iterations, the same curve."""
        text = (
            "param_scheduler = dict(_delete_=True, type='PolyLR', "
            'convert_to_iter_based=True)\n'
        )
        smaller = f'{text}train_dataloader = dict(batch_size=2)'
        whole = build(smaller)
        whole.train()
        expected = rates(logged(whole))
        build(text).train()
        runner = build(smaller, resume='epoch_1.pth')
        runner.train()
        assert rates(logged(runner)) == {
            step: lr for step, lr in expected.items() if step > 6
        }


class TestEnd:
    """One warning where the last learning rate is not small."""

    TEXT = 'The learning rate ends at'

    @pytest.mark.parametrize(
        'text, share',
        [
            ('param_scheduler = dict(T_max=200)', '100%'),
            (
                'train_cfg = dict(max_epochs=5)\n'
                'param_scheduler = dict(T_max=2)',
                '100%',
            ),
            (
                'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=4)',
                '100%',
            ),
        ],
        ids=['too long', 'climbs again', 'by iterations'],
    )
    def test_told(self, build, messages, text, share):
        runner = build(text)
        protect_run(runner)
        runner.train()
        (message,) = told(messages, self.TEXT)
        assert f'{self.TEXT} {share}' in message
        assert 'follows train_cfg' in message

    @pytest.mark.parametrize(
        'text',
        [
            '',
            'train_cfg = dict(max_epochs=3)',
            'param_scheduler = []',
            "param_scheduler = dict(_delete_=True, type='MultiStepLR',"
            ' milestones=[1])',
            'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=4)\n'
            'param_scheduler = dict(by_epoch=False)',
        ],
    )
    def test_not_told(self, build, messages, text):
        runner = build(text)
        protect_run(runner)
        runner.train()
        assert not told(messages, self.TEXT)

    def test_only_max_epochs(self, build, logged):
        """The schedule follows."""
        runner = build('train_cfg = dict(max_epochs=3)')
        runner.train()
        values = [*rates(logged(runner)).values()]
        assert values[::ITERS] == pytest.approx([0.03, 0.0225, 0.0075])
