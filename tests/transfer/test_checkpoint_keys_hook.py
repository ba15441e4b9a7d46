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
    @pytest.mark.parametrize(
        'change, words',
        [
            (lambda x: x, None),
            (lambda x: {f'module.{k}': v for k, v in x.items()}, None),
            (lambda x: without(x, 'num_batches_tracked'), None),
            (lambda x: without(x, 'fc_cls.bias'), r'1 of.*\nmissing: .*bias'),
            (lambda x: without(x, 'running_mean'), 'missing: .*running_mean'),
            (
                lambda x: x | {'roi_head.fc_cls.weight': torch.rand(3, 4)},
                r'fc_cls.weight: got \(3, 4\), expected \(',
            ),
        ],
    )
    def test_whole(self, make_runner, change, words):
        state = change(dict(Toy().state_dict()))
        runner = make_runner(Toy(), dict(state_dict=state))
        if words is None:
            assert runner.test() == dict(count=2)
            return
        with pytest.raises(ValueError, match=words):
            runner.test()


class TestResume:
    @pytest.mark.parametrize('hooks', [(), [dict(type='EMAHook')]])
    def test_whole(self, make_runner, tmp_path, hooks):
        """And a head that is missing."""
        checkpoint = trained(make_runner, tmp_path, hooks=hooks)
        runner = make_runner(Toy(), checkpoint, resume=True, hooks=hooks)
        runner.train()
        assert runner.epoch == 2
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
        """Not the name of their file counts."""
        assert not start(name)
        checkpoint = self.checkpoint(tmp_path)
        if name:
            files = checkpoint['message_hub']['runtime_info'][LOADED]
            assert list(files.values()) == [str(tmp_path / 'a.pth')]
            files.update(dict.fromkeys(files, '/elsewhere/a.pth'))
        assert not start(name, checkpoint)

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


@pytest.mark.parametrize('resume', [False, True])
def test_a_deeper_checkpoint_is_refused(make_runner, tmp_path, resume):
    """All tensors of the model are in it, and yet it is another network."""
    models = [Toy(), Toy()]
    small = dict(type='mmpretrain.ResNet', stem_channels=4, base_channels=4)
    for model, depth in zip(models, (34, 18), strict=True):
        model.backbone = MODELS.build(dict(small, depth=depth))
    state = dict(state_dict=models[0].state_dict())
    runner = make_runner(models[1], state, resume=resume)
    with pytest.raises(ValueError, match='not in the model: .*layer1.2'):
        runner.load_checkpoint(str(tmp_path / 'load.pth'))


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
        """A backbone without its prefix: mmengine itself would train."""
        state = Toy().backbone.state_dict()
        with pytest.raises(ValueError, match='loaded nothing.*Pretrained'):
            make_runner(Toy(), dict(state_dict=state)).train()
        make_runner(Toy(), dict(state_dict=state), check=False).train()

    def test_pre_training(self, build_tiny, make_runner):
        """From a checkpoint, or from a backbone for both encoders."""
        whole = build_tiny().state_dict()
        bare = {k: v for k, v in whole.items() if k.startswith('backbone.')}
        for state in (whole, bare):
            model = build_tiny()
            runner = make_runner(model, dict(state_dict=state))
            runner.optim_wrapper = runner.build_optim_wrapper(
                runner.optim_wrapper
            )
            runner.load_or_resume()
            for name, x in model.encoder_k.backbone.state_dict().items():
                assert torch.equal(x, bare[f'backbone.{name}'])


class TestInitialiserWasRun:
    def test_own_init_weights(self, make_runner):

        class Deaf(Toy):
            def init_weights(self):
                """As in mmdet's Swin: looks at the address alone."""

        ours = dict(type='mmdensecl.PretrainedBackbone', checkpoint='a.pth')
        with pytest.raises(ValueError, match='not run for "backbone"'):
            make_runner(Deaf(init_cfg=ours)).train()
