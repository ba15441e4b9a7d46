# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.dataset import ConcatDataset, DefaultSampler, RepeatDataset
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmdensecl.checkpoint import register_checkpoint_loader
from mmdensecl.datasets import UnlabeledFolder
from mmdensecl.datasets.unlabeled import unlabeled_parts
from mmdensecl.engine import (
    ContrastMonitorHook,
    LambdaWarmupHook,
    QueueLengthHook,
    UnlabeledDataHook,
)
from mmdensecl.engine.hooks import fit_queue_len
from mmdensecl.models.modules import FeatureQueue
from mmdensecl.testing import write_pictures

SAVE = dict(checkpoint=dict(type='CheckpointHook', interval=1))


class ToyContrast(BaseModel):
    """As much of an algorithm as the hooks touch."""

    def __init__(self, queue_len=8, outputs=None):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.queue = FeatureQueue(8 if queue_len == 'auto' else queue_len, 4)
        self.auto_queue_len = queue_len == 'auto'
        self.loss_lambda = 0.5
        self.category_weight = 0.3
        self.outputs = outputs or (lambda step: {})
        self.step = 0
        self.weights = []

    def set_queue_len(self, length):
        self.queue.resize(length)
        self.auto_queue_len = False

    def forward(self, inputs, data_samples=None, mode='loss'):
        self.weights.append((self.loss_lambda, self.category_weight))
        outputs = dict(loss=self.linear(torch.ones(2)).mean() ** 2)
        for name, value in self.outputs(self.step).items():
            outputs[name] = outputs['loss'] * 0 + value
        self.step += 1
        return outputs


def pack(results):
    sample = BaseDataElement(metainfo=dict(img_path=results['img_path']))
    return dict(inputs=torch.zeros(2), data_samples=sample)


@pytest.fixture
def make_runner(tmp_path):
    # As a config that names one of our types does, and a tool.
    register_checkpoint_loader()

    def make(
        hook,
        model=None,
        count=20,
        epochs=2,
        batch_size=2,
        transform=pack,
        times=1,
        train_cfg=None,
        **kwargs,
    ):
        write_pictures(tmp_path / 'pictures', count, size=4)
        dataset = UnlabeledFolder(str(tmp_path / 'pictures'), [transform])
        if times > 1:
            dataset = RepeatDataset(dataset, times)
        return Runner(
            model=model or ToyContrast(),
            work_dir=str(tmp_path / 'work'),
            train_dataloader=dict(
                dataset=dataset,
                batch_size=batch_size,
                sampler=dict(type=DefaultSampler, shuffle=False),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=train_cfg or dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            custom_hooks=[hook],
            experiment_name=f'{tmp_path.name}_{id(hook)}',
            **kwargs,
        )

    return make


class TestLambdaWarmup:
    def test_schedule(self, make_runner):
        """The weight of categories is held at 0 as long as lambda is."""
        model = ToyContrast()
        make_runner(LambdaWarmupHook(start_iters=7), model).train()
        assert model.weights == [(0.0, 0.0)] * 7 + [(0.5, 0.3)] * 13


class TestQueueLength:
    @pytest.mark.parametrize(
        'images, batch, expected',
        [
            (1281167, 256, 65536),
            (118287, 256, 59136),
            (212, 32, 96),
            (32, 32, 32),
        ],
    )
    def test_rule(self, images, batch, expected):
        assert fit_queue_len(images, batch) == expected

    @pytest.mark.parametrize('times', [1, 4])
    def test_auto(self, make_runner, messages, times):
        """Copies of images do not lengthen the queue."""
        model = ToyContrast('auto')
        make_runner(QueueLengthHook(), model, epochs=1, times=times).train()
        assert len(model.queue) == 10 and not model.auto_queue_len
        said = "queue_len='auto' -> 10: half of the dataset"
        assert any(said in text for _, text in messages)

    @pytest.mark.parametrize('length, told', [(64, True), (8, False)])
    def test_a_length_set_by_hand_stays(
        self, make_runner, warned, length, told
    ):
        model = ToyContrast(length)
        make_runner(QueueLengthHook(), model).train()
        assert len(model.queue) == length
        assert bool(warned('larger than the dataset of 20')) == told
        assert bool(warned('queue')) == told

    @pytest.mark.parametrize('resume', [False, True])
    def test_a_checkpoint_with_another_length(
        self, make_runner, messages, tmp_path, resume
    ):
        """load_from keeps this run's queue, resume the checkpoint's."""
        saved = ToyContrast(12)
        make_runner(
            QueueLengthHook(), saved, epochs=1, default_hooks=SAVE
        ).train()
        model = ToyContrast('auto')
        make_runner(
            QueueLengthHook(),
            model,
            load_from=str(tmp_path / 'work/epoch_1.pth'),
            resume=resume,
            cfg=dict(resume=resume),
        ).train()
        assert len(model.queue) == (12 if resume else 10)
        same = torch.equal(model.queue.negatives, saved.queue.negatives)
        assert same == resume
        expected = 'as in the checkpoint' if resume else 'start afresh'
        assert any(expected in text for _, text in messages)

    @pytest.mark.parametrize(
        'count, batch, times', [(3, 4, 1), (8, 32, 8)], ids=['few', 'copies']
    )
    def test_fewer_images_than_a_batch(self, make_runner, count, batch, times):
        runner = make_runner(
            QueueLengthHook(), count=count, batch_size=batch, times=times
        )
        with pytest.raises(ValueError, match=f'{count} distinct images, few'):
            runner.train()


def broken(*names):
    """A transform that cannot read some of the images."""

    def transform(results):
        if results['img_path'] in names:
            raise OSError('gone')
        return pack(results)

    return transform


class TestSeeds:
    @pytest.fixture
    def seeds(self, make_runner):
        """Function that gives the seed of each image that a run reads."""

        def run(**kwargs):
            def note(results):
                seeds.append(results['seed'])
                return pack(results)

            seeds = []
            make_runner(UnlabeledDataHook(), transform=note, **kwargs).train()
            return seeds

        return run

    def test_copies_of_an_image_get_seeds_of_their_own(self, seeds):
        found = seeds(count=3, times=4)
        assert len({*found}) == len(found) == 24

    def test_passes_of_an_endless_epoch_differ(self, seeds):
        """IterBasedTrainLoop knows one epoch only."""
        loop = dict(by_epoch=False, max_iters=6)
        found = seeds(count=4, train_cfg=loop)
        assert len(found) >= 12 and len({*found}) == len(found)

    def test_wrapped_data_sets(self, tmp_path):
        write_pictures(tmp_path, 2, size=4)
        parts = [UnlabeledFolder(str(tmp_path), [pack]) for _ in range(2)]
        assert list(unlabeled_parts(ConcatDataset(parts))) == parts
        assert list(unlabeled_parts(RepeatDataset(parts[0], 2))) == parts[:1]


class TestUnreadable:
    @pytest.fixture
    def listed(self, tmp_path):
        """Function that gives the list of a run, where there is one."""
        path = tmp_path / 'work' / 'unreadable.txt'
        return lambda: path.read_bytes() if path.exists() else None

    def test_listed_when_they_are_met(self, make_runner, listed):
        """Whatever ends the run then."""

        def fail(results):
            if results['img_path'] == '0007.png':
                raise KeyError('0007.png')
            return broken('0004.png')(results)

        with pytest.raises(KeyError):
            make_runner(UnlabeledDataHook(), transform=fail).train()
        assert listed() == b'0004.png\n'

    def test_those_of_other_ranks_count(self, make_runner, monkeypatch):
        """One of 20 was met here, the other rank met three more."""
        monkeypatch.setattr(
            'mmdensecl.engine.hooks.unlabeled_data_hook.all_reduce',
            lambda x, op: x[5:8].fill_(op == 'max'),
        )
        runner = make_runner(UnlabeledDataHook(), transform=broken('0000.png'))
        with pytest.raises(RuntimeError, match='4 of 20 images'):
            runner.train()

    @pytest.fixture
    def go_on(self, make_runner, tmp_path):
        """Function that runs the last two of an epoch's 21 iterations."""
        (tmp_path / 'pictures').mkdir()
        for name in ('0000\nb.png', '0000\udcff.png'):
            (tmp_path / 'pictures' / name).touch()  # pack looks at names only

        def run(noted, names, done=19, epoch=0):
            loop = dict(type='mmdensecl.ResumableEpochLoop', max_epochs=1)
            runner = make_runner(
                UnlabeledDataHook(),
                count=40,
                transform=broken(*names),
                train_cfg=loop,
            )
            Path(runner.work_dir, 'unreadable.txt').write_bytes(noted)
            runner._train_loop = runner.build_train_loop(runner._train_loop)
            runner.train_loop._iter = done
            runner.train_loop._epoch = epoch
            runner.train()

        return run

    def test_going_on_in_an_epoch(self, go_on, warned, listed):
        """Met before the stop, and still broken: counted and listed."""
        noted = b'0000\nb.png\n0000\xff.png\n0001.png\nno_more.png\n'
        go_on(noted, ['0000\nb.png', '0000\udcff.png', '0038.png'])
        assert listed() == b'0000\nb.png\n0000\xff.png\n0038.png\n'
        reports = [x[:7] for x in warned('could not be read')]
        assert reports == ['2 of 42', '3 of 42']

    def test_the_limit_minds_those_before(self, go_on, listed):
        names = [f'{i:04d}.png' for i in (3, 4, 5, 6, 39)]
        with pytest.raises(RuntimeError, match='5 of 42 .*unreadable.txt"'):
            go_on('\n'.join([*names[:4], '']).encode(), names)
        assert listed().decode().split() == names

    @pytest.mark.parametrize(
        'noted, names, settings, expected',
        [
            # What stopped the run does not stop it again once mended.
            (b''.join(b'%04d.png\n' % i for i in range(9)), [], {}, None),
            # An epoch from its start has a new list.
            (b'0005.png\n', ['0001.png'], dict(done=0), b'0001.png\n'),
            # A finished run keeps its own.
            (b'0005.png\n', [], dict(done=21, epoch=1), b'0005.png\n'),
        ],
        ids=['mended', 'from the start', 'finished'],
    )
    def test_the_list_is_of_the_epoch(
        self, go_on, listed, noted, names, settings, expected
    ):
        go_on(noted, names, **settings)
        assert listed() == expected


class TestContrastMonitor:
    @pytest.mark.parametrize('hooks', [{}, dict(runtime_info=None)])
    def test_a_loss_that_is_not_finite_stops(self, make_runner, hooks):
        """Also where nothing but this hook is ours."""

        def outputs(step):
            return dict(loss=float('nan')) if step >= 5 else {}

        model = ToyContrast(outputs=outputs)
        runner = make_runner(ContrastMonitorHook(), model, default_hooks=hooks)
        with pytest.raises(FloatingPointError, match='epoch 1, iteration 6 '):
            runner.train()

    def test_weights_that_are_not_finite_are_not_saved(
        self, make_runner, tmp_path
    ):
        """The checkpoint of the epoch before survives, and is named."""

        class Poison(ContrastMonitorHook):
            def after_train_epoch(self, runner):
                if runner.epoch == 1:
                    runner.model.linear.weight.data[0, 1] = float('inf')
                super().after_train_epoch(runner)

        runner = make_runner(Poison(), default_hooks=SAVE)
        with pytest.raises(FloatingPointError, match=r'linear.*epoch_1\.pth'):
            runner.train()
        saved = [x.name for x in (tmp_path / 'work').glob('*.pth')]
        assert saved == ['epoch_1.pth']

    @pytest.mark.parametrize(
        'values, said',
        [
            (dict(position_r2=60.0), None),
            (dict(feat_std=0.001), 'features have collapsed'),
            # And no word of a leak.
            (
                dict(position_r2=97.0, dense_acc=99.9),
                'position alone explains 97.0%',
            ),
            (dict(category_entropy=5.0), 'category_entropy is 5.0%'),
            (dict(category_entropy=15.0), None),
            (dict(global_acc=99.9), 'global_acc is 99.9% this early'),
            (dict(dense_acc=99.9), 'dense_acc is 99.9% this early'),
            # Before the queue is full, its random keys are easy to beat.
            (dict(category_entropy=5.0, queue_fill=60.0), None),
            (dict(dense_acc=99.9, queue_fill=60.0), None),
        ],
    )
    def test_warnings(self, make_runner, warned, values, said):
        """One where something is wrong, and else none."""
        outputs = dict(feat_std=0.9, global_acc=50.0, dense_acc=50.0)
        outputs = dict(outputs, queue_fill=100.0) | values
        model = ToyContrast(outputs=lambda step: outputs)
        make_runner(ContrastMonitorHook(interval=2, early=0.5), model).train()
        words = 'collapsed', 'early', 'position', 'category'
        found = [x for x in warned() if any(word in x for word in words)]
        assert len(found) == (said is not None)
        assert all(said in x for x in found)

    @pytest.mark.parametrize(
        'settings, done, told',
        [
            (dict(interval=2, early=0.5), 0, True),
            # A resumed run is not early.
            (dict(interval=2, early=0.5), 30, False),
            # As the demo: a tenth of it is over too soon to judge.
            (dict(), 0, True),
        ],
    )
    def test_what_is_early(self, make_runner, warned, settings, done, told):
        outputs = dict(global_acc=99.9, queue_fill=100.0)
        model = ToyContrast(outputs=lambda step: outputs)
        size = {} if settings else dict(count=12, epochs=20)
        runner = make_runner(ContrastMonitorHook(**settings), model, **size)
        runner.train_loop._iter = done
        runner.train()
        assert bool(warned('this early')) == told
