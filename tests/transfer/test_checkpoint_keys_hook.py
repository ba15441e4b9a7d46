# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A run stops when its weights did not arrive."""
import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdensecl.engine import add_checkpoint_check


class Toy(BaseModel):
    """A detector in miniature."""

    def __init__(self, classes=2):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
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
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
            test_dataloader=loader,
            test_cfg=dict(),
            test_evaluator=Count(),
            custom_hooks=cfg.custom_hooks,
            load_from=checkpoint,
            resume=resume,
            cfg=cfg,
            experiment_name=f'{request.node.name}{make.count}')

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
                ValueError, match=r'fc_cls.weight: got \(3, 4\), expected \('):
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
                runner.optim_wrapper)
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
            }, 'layer3')
        with pytest.raises(ValueError, match='backbone.layer3'):
            self.load(make_runner, build_tiny(), state)


def test_is_added_once():
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    add_checkpoint_check(cfg)
    add_checkpoint_check(cfg)
    assert [x.type for x in cfg.custom_hooks
            ] == ['EMAHook', 'mmdensecl.CheckpointKeysHook']
    for cfg in (Config(), Config(dict(custom_hooks=None))):
        add_checkpoint_check(cfg)
        assert len(cfg.custom_hooks) == 1
