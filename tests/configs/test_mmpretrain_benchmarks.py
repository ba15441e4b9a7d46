# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Linear evaluation, kNN and SVMs: the shipped configs, really run."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdensecl.engine import set_pretrained
from mmdensecl.evaluation import probe_loop
from mmdensecl.evaluation.probes import svm_map
from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'configs' / 'benchmarks' / 'mmpretrain'
LINEAR = 'resnet50_8xb32-steplr-100e_in1k_linear.py'
PROBES = [
    'resnet50_knn_in1k.py',
    'resnet50_svm_voc07.py',
    'resnet50_low-shot_voc07.py',
]
# 32 x 32 pixels become a 4 x 4 map of 32 channels.
TINY = dict(depth=18, stem_channels=4, base_channels=4, strides=(1, 1, 1, 2))
TINY.update(out_indices=(3,), style='pytorch')
CLASSES = ('cat', 'dog', 'train')
OBJECT = '<object><name>{}</name><difficult>{}</difficult></object>'


def load(name: str) -> Config:
    return Config.fromfile(FOLDER / name)


def shrink(cfg: Config, weights: str, work_dir: Path) -> Config:
    """A tiny backbone on small pictures, read by no worker processes."""
    cfg.model.backbone.update(TINY)
    if cfg.model.get('head'):
        cfg.model.head.update(in_channels=32, num_classes=2, topk=(1,))
    for loader in loaders(cfg):
        loader.update(num_workers=0, persistent_workers=False, batch_size=4)
        for transform in loader.dataset.pipeline:
            for key in ('scale', 'crop_size'):
                if key in transform:
                    pair = isinstance(transform[key], tuple)
                    transform[key] = (32, 32) if pair else 32
        is_voc = loader.dataset.type == 'VOC'
        loader.dataset.classes = CLASSES if is_voc else CLASSES[:2]
    if 'pool' in cfg.test_cfg:
        cfg.test_cfg.update(pool=(2, 2), costs=(0.1, 10.0), n_jobs=1)
    set_pretrained(cfg, weights)
    cfg.work_dir = str(work_dir)
    return cfg


def loaders(cfg: Config) -> list:
    found = [
        cfg.get('train_dataloader'),
        cfg.get('val_dataloader'),
        cfg.test_dataloader,
        cfg.test_cfg.get('train_dataloader'),
    ]
    return [loader for loader in found if loader is not None]


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> str:
    """A checkpoint of a tiny backbone, in the format of the authors."""
    from mmdensecl.registry import MODELS

    torch.manual_seed(3)
    backbone = MODELS.build(dict(type='mmpretrain.ResNet', **TINY))
    backbone.init_weights()
    for name, x in backbone.state_dict().items():
        if 'running' in name:  # statistics that would be seen to change
            x.add_(0.1 * torch.rand_like(x))
    path = tmp_path_factory.mktemp('weights') / 'backbone.pth'
    torch.save(dict(state_dict=backbone.state_dict(), author='me'), path)
    return str(path)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """ImageNet and VOC 2007 in small, in the layouts of the configs."""
    root = tmp_path_factory.mktemp('data')
    for i, name in enumerate(('cat', 'dog')):
        write_pictures(root / 'imagenet' / 'train' / name, 5, seed=i)
    shutil.copytree(root / 'imagenet' / 'train', root / 'imagenet' / 'val')
    voc = root / 'VOCdevkit' / 'VOC2007'
    for name in ('Annotations', 'ImageSets/Main'):
        (voc / name).mkdir(parents=True)
    write_pictures(voc / 'JPEGImages', 16)
    for i, path in enumerate(sorted((voc / 'JPEGImages').iterdir())):
        path.rename(path.with_suffix('.jpg'))  # the reader looks inside
        objects = [
            OBJECT.format(name, int(i == 3 and c == 0))
            for c, name in enumerate(CLASSES)
            if i % 4 in (c, 3)
        ]
        (voc / f'Annotations/{path.stem}.xml').write_text(
            f'<annotation>{"".join(objects)}</annotation>'
        )
    names = [f'{i:04d}\n' for i in range(16)]
    (voc / 'ImageSets/Main/trainval.txt').write_text(''.join(names[:12]))
    (voc / 'ImageSets/Main/test.txt').write_text(''.join(names[12:]))
    return root


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Function that runs tools/test.py here and gives what it wrote."""
    script = runpy.run_path(str(ROOT / 'tools' / 'test.py'))

    def run(cfg: Config, *flags: str) -> dict:
        cfg.dump(tmp_path / 'config.py')
        out = tmp_path / 'out.json'
        argv = ['test.py', str(tmp_path / 'config.py'), *flags]
        monkeypatch.setattr(sys, 'argv', [*argv, '--out', str(out)])
        script['main']()
        return json.loads(out.read_text())

    return run


class TestLinear:
    def test_recipe_is_mocos(self):
        cfg = load(LINEAR)
        sgd = dict(type='SGD', lr=30.0, momentum=0.9, weight_decay=0.0)
        assert cfg.optim_wrapper.optimizer == sgd
        assert cfg.param_scheduler[0].milestones == [60, 80]
        assert cfg.train_cfg.max_epochs == 100
        assert cfg.train_dataloader.batch_size == 32
        assert cfg.auto_scale_lr.base_batch_size == 8 * 32

    def test_only_the_head_learns(self, weights, data, tmp_path, tool):
        """Backbone and batch norm statistics stay bit by bit."""
        cfg = shrink(load(LINEAR), weights, tmp_path)
        for loader in loaders(cfg):
            loader.dataset.data_root = str(data / 'imagenet')
        cfg.train_cfg.max_epochs = 1
        cfg.val_evaluator.topk = cfg.test_evaluator.topk = (1,)
        cfg.default_hooks.checkpoint.interval = 1
        runner = Runner.from_cfg(cfg.copy())
        head = runner.model.head.state_dict()
        before = {k: v.clone() for k, v in head.items()}
        runner.train()
        assert runner.iter == 3
        given = torch.load(weights)['state_dict']
        after = runner.model.backbone.state_dict()
        assert given.keys() == after.keys()
        for name, expected in given.items():
            assert torch.equal(after[name], expected), name
        assert not any(
            torch.equal(before[k], v)
            for k, v in runner.model.head.state_dict().items()
        )
        # The checkpoint is tested by the tool, with the same result.
        scalar = runner.message_hub.get_scalar('val/accuracy/top1')
        trained = str(tmp_path / 'epoch_1.pth')
        assert tool(cfg, trained) == {'accuracy/top1': scalar.current()}
        # One that is not of this model is not.
        with pytest.raises(ValueError, match='were not loaded'):
            tool(cfg, weights)


class TestProbes:
    def run(self, name, weights, data, tmp_path, tool, **test_cfg):
        cfg = shrink(load(name), 'not yet', tmp_path)
        cfg.test_cfg.update(test_cfg)
        root = 'imagenet' if 'in1k' in name else 'VOCdevkit'
        metrics = tool(
            cfg, weights, '--cfg-options', f'data_root={data / root}'
        )
        # mmengine writes them too.
        (written,) = tmp_path.glob('*_*/*_*.json')
        logged = json.loads(written.read_text())
        assert {k: logged[k] for k in metrics} == pytest.approx(metrics)
        return metrics

    def test_knn(self, weights, data, tmp_path, tool):
        ks = dict(ks=(1, 10))
        metrics = self.run(PROBES[0], weights, data, tmp_path, tool, **ks)
        # val is a copy of train: the nearest picture is the same one.
        assert metrics['knn_1/top1'] == 100
        assert metrics['knn_10/top5'] == 100
        assert len(metrics) == 4

    def test_svm(self, weights, data, tmp_path, tool, monkeypatch):
        seen = []

        def spy(*args, **kwargs):
            seen.extend(args)
            return svm_map(*args, **kwargs)

        monkeypatch.setattr(probe_loop, 'svm_map', spy)
        metrics = self.run(PROBES[1], weights, data, tmp_path, tool)
        assert set(metrics) == {'svm/mAP', *(f'svm/{c}' for c in CLASSES)}
        each = [metrics[f'svm/{c}'] for c in CLASSES]
        assert metrics['svm/mAP'] == pytest.approx(sum(each) / 3)
        assert all(0 < x <= 100 for x in each)
        shapes = [(12, 128), (12, 3), (4, 128), (4, 3)]
        assert [x.shape for x in seen] == shapes
        expected = [[i % 4 in (c, 3) for c in range(3)] for i in range(16)]
        expected[3][0] = -1  # difficult
        assert [*seen[1].tolist(), *seen[3].tolist()] == expected

    def test_protocols(self):
        knn, svm, low_shot = (load(name).test_cfg for name in PROBES)
        assert knn.ks == (10, 20, 100, 200) and knn.temperature == 0.07
        assert svm.pool == low_shot.pool == (6, 1)
        assert low_shot.shots == (1, 2, 4, 8, 16, 32, 64, 96)
        assert low_shot.num_samples == 5
        for cfg in map(load, PROBES[1:]):
            assert cfg.test_cfg.train_dataloader.dataset.split == 'trainval'
            assert cfg.test_dataloader.dataset.split == 'test'
