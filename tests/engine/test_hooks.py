# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.dataset import ConcatDataset, DefaultSampler, RepeatDataset
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmdensecl.checkpoint import register_checkpoint_loader
from mmdensecl.datasets import UnlabeledFolder
from mmdensecl.engine import (
    ContrastMonitorHook,
    LambdaWarmupHook,
    QueueLengthHook,
    UnlabeledDataHook,
)
from mmdensecl.engine.hooks import fit_queue_len, unlabeled_data_hook
from mmdensecl.engine.hooks.unlabeled_data_hook import unlabeled_parts
from mmdensecl.models.modules import FeatureQueue
from mmdensecl.testing import write_pictures


class ToyContrast(BaseModel):
    """As much of an algorithm as the hooks touch."""

    def __init__(self, queue_len=8, outputs=None):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.queue = FeatureQueue(8 if queue_len == 'auto' else queue_len, 4)
        self.auto_queue_len = queue_len == 'auto'
        self.loss_lambda = 0.5
        self.outputs = outputs or (lambda step: {})
        self.step = 0
        self.lambdas, self.epochs = [], []

    def set_queue_len(self, length):
        self.queue.resize(length)
        self.auto_queue_len = False

    def forward(self, inputs, data_samples=None, mode='loss'):
        self.lambdas.append(self.loss_lambda)
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
        model,
        hooks,
        count=20,
        epochs=2,
        batch_size=2,
        pipeline=(pack,),
        times=1,
        **kwargs,
    ):
        write_pictures(tmp_path / 'pictures', count, size=4)
        dataset = UnlabeledFolder(str(tmp_path / 'pictures'), list(pipeline))
        if times > 1:
            dataset = RepeatDataset(dataset, times)
        return Runner(
            model=model,
            work_dir=str(tmp_path / 'work'),
            train_dataloader=dict(
                dataset=dataset,
                batch_size=batch_size,
                sampler=dict(type=DefaultSampler, shuffle=False),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=kwargs.pop(
                'train_cfg', dict(by_epoch=True, max_epochs=epochs)
            ),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            custom_hooks=hooks,
            experiment_name=f'{tmp_path.name}_{id(hooks)}',
            **kwargs,
        )

    return make


def warnings_of(messages):
    return [text for level, text in messages if level == 'WARNING']


class TestLambdaWarmup:
    def test_schedule(self, make_runner):
        model = ToyContrast()
        make_runner(model, [LambdaWarmupHook(start_iters=7)]).train()
        assert model.lambdas == [0.0] * 7 + [0.5] * 13

    def test_category_weight(self, make_runner):
        """Held at 0 as long as lambda is."""
        model, weights = ToyContrast(), []
        model.category_weight = 0.3
        model.outputs = lambda step: (
            weights.append(model.category_weight) or {}
        )
        make_runner(model, [LambdaWarmupHook(start_iters=7)]).train()
        assert weights == [0.0] * 7 + [0.3] * 13
        assert model.lambdas == [0.0] * 7 + [0.5] * 13

    def test_a_model_without_lambda(self, make_runner):
        model = ToyContrast()
        del model.loss_lambda
        model.forward = lambda *args, **kwargs: None
        with pytest.raises(TypeError, match='no loss_lambda'):
            make_runner(model, [LambdaWarmupHook()]).train()

    def test_negative(self):
        with pytest.raises(ValueError, match='-1'):
            LambdaWarmupHook(-1)


class TestQueueLength:
    @pytest.mark.parametrize(
        'images, batch, expected',
        [
            (1281167, 256, 65536),
            (118287, 256, 59136),
            (1000, 32, 480),
            (212, 32, 96),
            (40, 32, 32),
            (32, 32, 32),
        ],
    )
    def test_rule(self, images, batch, expected):
        length = fit_queue_len(images, batch)
        assert length == expected
        assert length % batch == 0

    def test_auto(self, make_runner, messages):
        model = ToyContrast('auto')
        make_runner(model, [QueueLengthHook()], count=20).train()
        assert len(model.queue) == 10 and not model.auto_queue_len
        assert any(
            "queue_len='auto' -> 10: half of the dataset" in text
            for _, text in messages
        )

    def test_a_length_set_by_hand_stays(self, make_runner, messages):
        model = ToyContrast(64)
        make_runner(model, [QueueLengthHook()], count=20).train()
        assert len(model.queue) == 64
        assert any(
            'larger than the dataset of 20' in text
            for text in warnings_of(messages)
        )

    def test_a_length_that_fits_is_not_commented(self, make_runner, messages):
        make_runner(ToyContrast(8), [QueueLengthHook()], count=20).train()
        assert not any('queue' in text for text in warnings_of(messages))

    @pytest.mark.parametrize('resume', [False, True])
    def test_a_checkpoint_with_another_length(
        self, make_runner, messages, tmp_path, resume
    ):
        """load_from keeps this run's queue, resume the checkpoint's."""
        saved = make_runner(
            ToyContrast(12),
            [QueueLengthHook()],
            epochs=1,
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=1)
            ),
        )
        saved.train()
        model = ToyContrast('auto')
        runner = make_runner(
            model,
            [QueueLengthHook()],
            load_from=str(tmp_path / 'work/epoch_1.pth'),
            resume=resume,
            cfg=dict(resume=resume),
        )
        runner.train()
        assert len(model.queue) == (12 if resume else 10)
        same = torch.equal(model.queue.negatives, saved.model.queue.negatives)
        assert same == resume
        expected = 'as in the checkpoint' if resume else 'start afresh'
        assert any(expected in text for _, text in messages)

    def test_fewer_pictures_than_a_batch(self, make_runner):
        with pytest.raises(ValueError, match='3 distinct images, fewer'):
            make_runner(
                ToyContrast(), [QueueLengthHook()], count=3, batch_size=4
            ).train()

    def test_copies_do_not_lengthen_the_queue(self, make_runner):
        model = ToyContrast('auto')
        make_runner(model, [QueueLengthHook()], times=4, epochs=1).train()
        assert len(model.queue) == 10

    def test_copies_do_not_fill_a_batch(self, make_runner):
        with pytest.raises(ValueError, match='8 distinct images, fewer'):
            make_runner(
                ToyContrast(),
                [QueueLengthHook()],
                count=8,
                times=8,
                batch_size=32,
            ).train()


def seeds_of_a_run(make_runner, **kwargs):
    """The seed of each image that a run reads."""
    seeds = []

    def note(results):
        seeds.append(results['seed'])
        return pack(results)

    make_runner(
        ToyContrast(), [UnlabeledDataHook()], pipeline=[note], **kwargs
    ).train()
    return seeds


class TestUnlabeledData:
    def test_copies_of_an_image_get_seeds_of_their_own(self, make_runner):
        seeds = seeds_of_a_run(make_runner, count=3, times=4, epochs=2)
        assert len({*seeds}) == len(seeds) == 24

    def test_epoch_and_seed_reach_the_data_set(self, make_runner):
        clocks = []

        def note(results):
            clocks.append(
                tuple(runner.train_dataloader.dataset._clock.tolist())
            )
            return pack(results)

        runner = make_runner(
            ToyContrast(),
            [UnlabeledDataHook()],
            pipeline=[note],
            randomness=dict(seed=11),
        )
        runner.train()
        assert clocks == [(11, 0)] * 20 + [(11, 1)] * 20

    def test_passes_of_an_endless_epoch_differ(self, make_runner):
        """IterBasedTrainLoop knows one epoch only."""
        seeds = seeds_of_a_run(
            make_runner,
            count=4,
            train_cfg=dict(by_epoch=False, max_iters=6),
        )
        assert len(seeds) >= 12 and len(set(seeds)) == len(seeds)

    def test_wrapped_data_sets(self, tmp_path):
        write_pictures(tmp_path, 2, size=4)
        parts = [UnlabeledFolder(str(tmp_path), [pack]) for _ in range(3)]
        assert list(unlabeled_parts(ConcatDataset(parts[:2]))) == parts[:2]
        assert list(unlabeled_parts(RepeatDataset(parts[0], 2))) == parts[:1]
        assert list(unlabeled_parts(parts[2])) == [parts[2]]

    def test_other_ranks_unreadable_pictures_count(
        self, make_runner, monkeypatch
    ):
        """One of 20 was met here, the other rank met three more."""

        def broken_first(results):
            if results['img_path'] == '0000.png':
                raise OSError('gone')
            return pack(results)

        def all_reduce(x, op):
            assert op == 'max'
            x[5:8] = 1

        monkeypatch.setattr(unlabeled_data_hook, 'all_reduce', all_reduce)
        with pytest.raises(RuntimeError, match='4 of 20 images'):
            make_runner(
                ToyContrast(), [UnlabeledDataHook()], pipeline=[broken_first]
            ).train()

    @pytest.fixture
    def go_on(self, make_runner, tmp_path):
        """Function that runs the last two of an epoch's 21 iterations."""
        (tmp_path / 'pictures').mkdir()
        for name in ('0000\nb.png', '0000\udcff.png'):
            (tmp_path / 'pictures' / name).touch()  # pack looks at names only

        def run(noted, broken, done=19, epoch=0):

            def break_some(results):
                if results['img_path'] in broken:
                    raise OSError('gone')
                return pack(results)

            runner = make_runner(
                ToyContrast(),
                [UnlabeledDataHook()],
                count=40,
                pipeline=[break_some],
                train_cfg=dict(
                    type='mmdensecl.ResumableEpochLoop', max_epochs=1
                ),
            )
            path = Path(runner.work_dir, 'unreadable.txt')
            path.write_bytes(noted)
            runner._train_loop = runner.build_train_loop(runner._train_loop)
            runner.train_loop._iter = done
            runner.train_loop._epoch = epoch
            try:
                runner.train()
            finally:
                self.listed = path.read_bytes() if path.exists() else None

        return run

    def test_going_on_in_an_epoch(self, go_on, messages):
        """Met before the stop, and still broken: counted and listed."""
        noted = b'0000\nb.png\n0000\xff.png\n0001.png\nno_more.png\n'
        go_on(noted, ['0000\nb.png', '0000\udcff.png', '0038.png'])
        assert self.listed == b'0000\nb.png\n0000\xff.png\n0038.png\n'
        reports = [
            t[:7] for t in warnings_of(messages) if 'could not be read' in t
        ]
        assert reports == ['2 of 42', '3 of 42']

    def test_going_on_behind_the_last_iteration(self, go_on):
        go_on(b'0005.png\n0006.png\n', ['0006.png', '0007.png'], done=21)
        assert self.listed == b'0006.png\n'

    def test_the_limit_minds_those_before(self, go_on):
        names = [f'{i:04d}.png' for i in (3, 4, 5, 6, 39)]
        with pytest.raises(RuntimeError, match='5 of 42 .*unreadable.txt"'):
            go_on('\n'.join(names[:4] + ['']).encode(), names)
        assert self.listed.decode().split() == names

    def test_mended_before_going_on(self, go_on):
        """What stopped the run does not stop it again; the list is gone."""
        go_on(b''.join(b'%04d.png\n' % i for i in range(9)), [])
        assert self.listed is None

    def test_an_epoch_from_its_start_has_a_new_list(self, go_on):
        go_on(b'0005.png\n', ['0001.png'], done=0)
        assert self.listed == b'0001.png\n'

    def test_a_finished_run_keeps_its_list(self, go_on):
        go_on(b'0005.png\n', [], done=21, epoch=1)
        assert self.listed == b'0005.png\n'

    def test_listed_when_they_are_met(self, make_runner, tmp_path):
        """Whatever ends the run then."""

        def fail(results):
            name = results['img_path']
            if name == '0007.png':
                raise KeyError(name)
            if name == '0004.png':
                raise OSError('gone')
            return pack(results)

        with pytest.raises(KeyError):
            make_runner(
                ToyContrast(), [UnlabeledDataHook()], pipeline=[fail]
            ).train()
        text = Path(tmp_path, 'work', 'unreadable.txt').read_text()
        assert text == '0004.png\n'

    def test_a_full_disk_keeps_the_older_list(self, tmp_path):
        resource = pytest.importorskip('resource')
        path, said = tmp_path / 'unreadable.txt', []
        path.write_bytes(b'a.png\n')
        runner = SimpleNamespace(
            work_dir=str(tmp_path), logger=SimpleNamespace(warning=said.append)
        )
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
        try:
            UnlabeledDataHook()._report(runner, ['a.png', 'b.png'], 9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == b'a.png\n'
        assert [*tmp_path.iterdir()] == [path]
        assert '2 of 9 images' in said[0]
        assert f'"{path}" could not be written (File too large)' in said[1]

    def test_names_that_are_no_utf8(self, tmp_path):
        """As os.fsdecode gives them."""
        runner = SimpleNamespace(
            work_dir=str(tmp_path),
            logger=SimpleNamespace(warning=lambda text: text.encode()),
        )
        UnlabeledDataHook()._report(runner, ['\udce4.jpg', 'b.jpg'], 9)
        text = (tmp_path / 'unreadable.txt').read_bytes()
        assert text == b'\xe4.jpg\nb.jpg\n'

    def test_no_place_for_the_list(self, tmp_path):
        """A picture is replaced all the same."""
        write_pictures(tmp_path, 20, size=4)
        (tmp_path / '0003.png').write_bytes(b'')
        dataset = UnlabeledFolder(
            str(tmp_path), [dict(type='mmdensecl.DecodeRGB')]
        )
        dataset.unreadable_file = str(tmp_path / 'none' / 'unreadable.txt')
        assert 'img' in dataset[3]
        assert dataset.unreadable.sum() == 1

    def test_unreadable_pictures_are_reported_once(
        self, make_runner, messages, tmp_path
    ):

        def broken_third(results):
            if results['img_path'] == '0002.png':
                raise OSError('gone')
            return pack(results)

        make_runner(
            ToyContrast(),
            [UnlabeledDataHook()],
            pipeline=[broken_third],
            epochs=3,
        ).train()
        reports = [
            t for t in warnings_of(messages) if 'could not be read' in t
        ]
        assert len(reports) == 1
        assert '1 of 20 images' in reports[0] and '0002.png' in reports[0]
        text = Path(tmp_path, 'work', 'unreadable.txt').read_text()
        assert text == '0002.png\n'

    def test_nothing_broken_nothing_said(
        self, make_runner, messages, tmp_path
    ):
        make_runner(ToyContrast(), [UnlabeledDataHook()]).train()
        assert not any('could not be read' in t for t in warnings_of(messages))
        assert not Path(tmp_path, 'work', 'unreadable.txt').exists()


class TestContrastMonitor:
    def test_loss_that_is_not_finite_stops(self, make_runner, tmp_path):
        """The checkpoint of the epoch before survives, and is named."""
        model = ToyContrast(
            outputs=lambda step: {'loss': float('nan')} if step == 14 else {}
        )
        with pytest.raises(FloatingPointError) as error:
            make_runner(
                model,
                [ContrastMonitorHook()],
                epochs=3,
                default_hooks=dict(
                    runtime_info=dict(
                        type='mmdensecl.BufferedRuntimeInfoHook'
                    ),
                    checkpoint=dict(type='CheckpointHook', interval=1),
                ),
            ).train()
        message = str(error.value)
        assert 'epoch 2, iteration 15' in message
        assert 'begins with: 0008.png, 0009.png.' in message
        assert 'epoch_1.pth' in message and '--resume' in message
        saved = sorted(p.name for p in Path(tmp_path, 'work').glob('*.pth'))
        assert saved == ['epoch_1.pth']

    def test_weights_that_are_not_finite_are_not_saved(
        self, make_runner, tmp_path
    ):

        class Poison(ContrastMonitorHook):
            def after_train_epoch(self, runner):
                if runner.epoch == 1:
                    runner.model.linear.weight.data[0, 1] = float('inf')
                super().after_train_epoch(runner)

        with pytest.raises(FloatingPointError, match=r'linear.*epoch_1\.pth'):
            make_runner(
                ToyContrast(),
                [Poison()],
                default_hooks=dict(
                    checkpoint=dict(
                        type='CheckpointHook', interval=1, max_keep_ckpts=1
                    )
                ),
            ).train()
        saved = sorted(p.name for p in Path(tmp_path, 'work').glob('*.pth'))
        assert saved == ['epoch_1.pth']

    def watch(self, make_runner, messages, **values):
        outputs = dict(
            feat_std=0.9, global_acc=50.0, dense_acc=50.0, queue_fill=100.0
        )
        outputs.update(values)
        make_runner(
            ToyContrast(outputs=lambda step: outputs),
            [ContrastMonitorHook(interval=2, early=0.5)],
        ).train()
        return warnings_of(messages)

    def test_a_healthy_run_is_left_alone(self, make_runner, messages):
        texts = self.watch(make_runner, messages, position_r2=60.0)
        assert not any(
            'collapsed' in t or 'early' in t or 'position' in t for t in texts
        )

    def test_collapse(self, make_runner, messages):
        texts = self.watch(make_runner, messages, feat_std=0.001)
        assert sum('features have collapsed' in t for t in texts) == 1

    def test_positions_instead_of_images(self, make_runner, messages):
        texts = self.watch(
            make_runner, messages, position_r2=97.0, dense_acc=99.9
        )
        assert sum('position alone explains 97.0%' in t for t in texts) == 1
        assert not any('this early' in t for t in texts)

    @pytest.mark.parametrize(
        'entropy, fill, warnings',
        [
            (5.0, 100.0, 1),
            (15.0, 100.0, 0),
            (5.0, 60.0, 0),
        ],
    )
    def test_one_category(
        self, make_runner, messages, entropy, fill, warnings
    ):
        """Once, and not before the queue is full."""
        texts = self.watch(
            make_runner, messages, category_entropy=entropy, queue_fill=fill
        )
        found = [t for t in texts if 'category_entropy is 5.0%' in t]
        assert len(found) == warnings

    @pytest.mark.parametrize('name', ['global_acc', 'dense_acc'])
    def test_leak(self, make_runner, messages, name):
        texts = self.watch(make_runner, messages, **{name: 99.9})
        assert sum(f'{name} is 99.9% this early' in t for t in texts) == 1

    def test_leak_in_a_short_run_with_the_defaults(
        self, make_runner, messages
    ):
        """120 steps, as the demo: a tenth of it is over too soon to judge."""
        outputs = dict(global_acc=99.9, queue_fill=100.0)
        make_runner(
            ToyContrast(outputs=lambda step: outputs),
            [ContrastMonitorHook()],
            count=12,
            epochs=20,
        ).train()
        assert any('this early' in t for t in warnings_of(messages))

    @pytest.mark.parametrize('done, told', [(0, True), (30, False)])
    def test_a_resumed_run_is_not_early(
        self, make_runner, messages, done, told
    ):
        outputs = dict(global_acc=99.9, queue_fill=100.0)
        runner = make_runner(
            ToyContrast(outputs=lambda step: outputs),
            [ContrastMonitorHook(interval=2, early=0.5)],
        )
        runner.train_loop._iter = done
        runner.train()
        found = any('this early' in t for t in warnings_of(messages))
        assert found == told

    def test_a_random_queue_is_easy_to_beat(self, make_runner, messages):
        texts = self.watch(
            make_runner, messages, dense_acc=99.9, queue_fill=60.0
        )
        assert not any('this early' in t for t in texts)
