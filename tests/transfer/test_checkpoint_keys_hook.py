# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A run stops when its weights did not arrive."""

import hashlib
import logging

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, Sequential
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdensecl.engine import add_checkpoint_check
from mmdensecl.registry import MODELS
from mmdensecl.transfer.pretrained_backbone import LOADED


class Toy(BaseModel):
    """A detector in miniature."""

    def __init__(self, classes=2, init_cfg=None):
        super().__init__()
        self.backbone = Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), init_cfg=init_cfg
        )
        self.roi_head = nn.Module()
        self.roi_head.shared_head = nn.Linear(4, 4)
        self.roi_head.fc_cls = nn.Linear(4, classes)

    def forward(self, inputs, mode='loss'):
        x = torch.stack(list(inputs))
        x = self.roi_head.fc_cls(self.roi_head.shared_head(self.backbone(x)))
        return dict(loss=x.mean()) if mode == 'loss' else [x]


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(count=len(results))


@pytest.fixture
def make_runner(tmp_path, request):
    """Function that builds a Runner like the tools do."""

    def make(model, checkpoint=None, resume=False, hooks=(), check=True):
        cfg = Config(dict(resume=resume, custom_hooks=list(hooks)))
        if check:
            add_checkpoint_check(cfg)
        loader = DataLoader([dict(inputs=x) for x in torch.rand(4, 2)], 2)
        if checkpoint is not None:
            torch.save(checkpoint, tmp_path / 'load.pth')
            checkpoint = str(tmp_path / 'load.pth')
        make.count += 1
        return Runner(
            model=model,
            work_dir=str(tmp_path / 'work'),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            test_dataloader=loader,
            test_cfg=dict(),
            test_evaluator=Count(),
            custom_hooks=cfg.custom_hooks,
            load_from=checkpoint,
            resume=resume,
            cfg=cfg,
            experiment_name=f'{request.node.name}{make.count}',
        )

    make.count = 0
    return make


def without(state, part):
    return {k: v for k, v in state.items() if part not in k}


def trained(make_runner, tmp_path, **kwargs):
    """A checkpoint of the first epoch, as mmengine writes it."""
    make_runner(Toy(), **kwargs).train()
    return torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)


class TestTest:
    @pytest.mark.parametrize('prefix', ['', 'module.'])
    def test_whole(self, make_runner, prefix):
        state = {prefix + k: v for k, v in Toy().state_dict().items()}
        metrics = make_runner(Toy(), dict(state_dict=state)).test()
        assert metrics == dict(count=2)

    @pytest.mark.parametrize('part', ['fc_cls.bias', 'running_mean'])
    def test_missing(self, make_runner, part):
        state = without(Toy().state_dict(), part)
        with pytest.raises(ValueError, match=rf'1 of.*\nmissing: .*{part}'):
            make_runner(Toy(), dict(state_dict=state)).test()

    def test_shape(self, make_runner):
        with pytest.raises(
            ValueError, match=r'fc_cls.weight: got \(3, 4\), expected \('
        ):
            make_runner(Toy(), dict(state_dict=Toy(3).state_dict())).test()

    def test_counters_may_be_missing(self, make_runner):
        state = without(Toy().state_dict(), 'num_batches_tracked')
        make_runner(Toy(), dict(state_dict=state)).test()

    def test_ema(self, make_runner, tmp_path):
        hook = dict(type='EMAHook')
        checkpoint = trained(make_runner, tmp_path, hooks=[hook])
        assert 'ema_state_dict' in checkpoint
        make_runner(Toy(), checkpoint, hooks=[hook]).test()
        make_runner(Toy(), checkpoint).test()


class TestResume:
    def test_whole(self, make_runner, tmp_path):
        checkpoint = trained(make_runner, tmp_path)
        runner = make_runner(Toy(), checkpoint, resume=True)
        runner.train()
        assert runner.epoch == 2

    def test_ema(self, make_runner, tmp_path):
        hook = dict(type='EMAHook')
        checkpoint = trained(make_runner, tmp_path, hooks=[hook])
        make_runner(Toy(), checkpoint, resume=True, hooks=[hook]).train()

    def test_missing_head(self, make_runner, tmp_path):
        checkpoint = trained(make_runner, tmp_path)
        checkpoint['state_dict'] = without(checkpoint['state_dict'], 'fc_cls')
        with pytest.raises(ValueError, match='To resume.*whole'):
            make_runner(Toy(), checkpoint, resume=True).train()


class TestOrigins:
    """A resumed run keeps its weights, whatever initialises the model."""

    @pytest.fixture
    def start(self, make_runner, tmp_path):
        """Function that trains from a file and gives warnings of weights."""

        def start(name, resumed=None):
            init_cfg = None
            if name:
                torch.manual_seed(ord(name))
                path = tmp_path / f'{name}.pth'
                torch.save(Toy().state_dict(), path)
                init_cfg = dict(
                    type='mmdensecl.PretrainedBackbone', checkpoint=str(path)
                )
            runner = make_runner(
                Toy(init_cfg=init_cfg), resumed, resume=resumed is not None
            )
            records, handler = [], logging.Handler(logging.WARNING)
            handler.emit = lambda record: records.append(record.getMessage())
            runner.logger.addHandler(handler)
            runner.train()
            return [x for x in records if 'initialised from' in x]

        return start

    @staticmethod
    def checkpoint(tmp_path, epoch=1):
        return torch.load(
            tmp_path / f'work/epoch_{epoch}.pth', weights_only=False
        )

    @pytest.mark.parametrize('name', ['a', None])
    def test_same_weights(self, start, tmp_path, name):
        assert not start(name)
        assert not start(name, self.checkpoint(tmp_path))

    @pytest.mark.parametrize(
        'new, old', [('b', 'a'), ('b', None), (None, 'a')]
    )
    def test_other_weights(self, start, tmp_path, new, old):

        def words(name, otherwise):
            if name is None:
                return otherwise
            path = tmp_path / f'{name}.pth'
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            return f'"{path}" (sha256 {sha256[:8]})'

        start(old)
        (warning,) = start(new, self.checkpoint(tmp_path))
        assert f'initialised from {words(new, "no file")}, but' in warning
        assert f'began from {words(old, "no known file")}.' in warning
        # Whose weights they are, its checkpoints know as well.
        resumed = self.checkpoint(tmp_path, 2)
        assert not start(old, resumed)

    def test_moved_file(self, start, tmp_path):
        """Not the name counts."""
        start('a')
        checkpoint = self.checkpoint(tmp_path)
        files = checkpoint['message_hub']['runtime_info'][LOADED]
        assert list(files.values()) == [str(tmp_path / 'a.pth')]
        files.update(dict.fromkeys(files, '/elsewhere/a.pth'))
        assert not start('a', checkpoint)


class TestDeeperCheckpoint:
    """All tensors of the model are in it, and yet it is another network."""

    @staticmethod
    def build(**backbone):
        model = Toy()
        model.backbone = MODELS.build(
            dict(
                type='mmpretrain.ResNet',
                stem_channels=4,
                base_channels=4,
                **backbone,
            )
        )
        return model

    @pytest.mark.parametrize(
        'training, resume', [(False, False), (True, False), (True, True)]
    )
    def test_is_refused(self, make_runner, tmp_path, training, resume):
        state = self.build(depth=34).state_dict()
        runner = make_runner(
            self.build(depth=18), dict(state_dict=state), resume=resume
        )
        if training:
            runner.optim_wrapper = runner.build_optim_wrapper(
                runner.optim_wrapper
            )
        with pytest.raises(ValueError) as error:
            runner.load_checkpoint(str(tmp_path / 'load.pth'))
        assert 'not in the model: backbone.layer1.2.' in str(error.value)

    def test_other_stages_are_not_needed(self, make_runner):
        """Such as layer4 for the backbone of a C4 detector."""
        state = self.build(depth=18).state_dict()
        model = self.build(
            depth=18,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
        )
        make_runner(model, dict(state_dict=state)).load_or_resume()
        assert torch.equal(
            model.backbone.conv1.weight, state['backbone.conv1.weight']
        )


class TestLoadFrom:
    def test_new_head(self, make_runner, tmp_path):
        source = Toy(3)
        runner = make_runner(Toy(), dict(state_dict=source.state_dict()))
        runner.train()
        log = next((tmp_path / 'work').rglob('*.log')).read_text()
        assert 'WARNING' in log
        assert 'fc_cls.bias: got (3,), expected (2,)' in log

    @pytest.mark.parametrize('part', ['backbone.0.weight', 'shared_head'])
    def test_backbone_is_not_whole(self, make_runner, part):
        state = without(Toy().state_dict(), part)
        with pytest.raises(ValueError) as error:
            make_runner(Toy(), dict(state_dict=state)).train()
        assert f'{part}' in str(error.value)
        assert 'PretrainedBackbone' in str(error.value)

    def test_nothing_fits(self, make_runner):
        """A backbone without its prefix."""
        state = Toy().backbone.state_dict()
        with pytest.raises(ValueError, match='loaded nothing.*Pretrained'):
            make_runner(Toy(), dict(state_dict=state)).train()

    def test_without_the_hook_it_would_train(self, make_runner):
        """So that the test above says something."""
        state = Toy().backbone.state_dict()
        make_runner(Toy(), dict(state_dict=state), check=False).train()


class TestPreTraining:
    def load(self, make_runner, model, state, training=True):
        runner = make_runner(model, dict(state_dict=state))
        if training:
            runner.optim_wrapper = runner.build_optim_wrapper(
                runner.optim_wrapper
            )
        runner.load_or_resume()

    @pytest.mark.parametrize('training', [True, False])
    def test_own_checkpoint(self, build_tiny, make_runner, training):
        state = build_tiny().state_dict()
        self.load(make_runner, build_tiny(), state, training)

    def test_bare_backbone_for_both_encoders(self, build_tiny, make_runner):
        state = {
            f'backbone.{k}': v
            for k, v in build_tiny().backbone.state_dict().items()
        }
        model = build_tiny()
        self.load(make_runner, model, state)
        for name, x in model.encoder_k.backbone.state_dict().items():
            assert torch.equal(x, state[f'backbone.{name}'])

    def test_half_a_backbone(self, build_tiny, make_runner):
        state = without(
            {
                f'backbone.{k}': v
                for k, v in build_tiny().backbone.state_dict().items()
            },
            'layer3',
        )
        with pytest.raises(ValueError, match='backbone.layer3'):
            self.load(make_runner, build_tiny(), state)


class TestInitialiserWasRun:
    def test_own_init_weights(self, make_runner):

        class Deaf(Toy):
            def init_weights(self):
                """As in mmdet's Swin: looks at the address alone."""

        ours = dict(type='mmdensecl.PretrainedBackbone', checkpoint='a.pth')
        with pytest.raises(ValueError, match='not run for "backbone"'):
            make_runner(Deaf(init_cfg=ours)).train()


def test_is_added_once():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    add_checkpoint_check(cfg)
    add_checkpoint_check(cfg)
    assert [x.type for x in cfg.custom_hooks] == [
        'EMAHook',
        'mmdensecl.CheckpointKeysHook',
    ]
    for cfg in (Config(), Config(dict(custom_hooks=None))):
        add_checkpoint_check(cfg)
        assert len(cfg.custom_hooks) == 1
