# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The hook with the real visualizers, on pictures of one colour each."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from torch.utils.data import Dataset

HEIGHT, WIDTH = 60, 90
BOXES = [[5.0, 5.0, 40.0, 50.0], [50.0, 5.0, 85.0, 50.0]]


class Pictures(Dataset):
    """Picture ``i`` is grey of level ``20 * i``."""

    METAINFO = dict(
        classes=('left', 'right'), palette=[(255, 0, 0), (0, 0, 255)]
    )

    def __init__(self, folder, count, host, labels):
        self.metainfo = self.METAINFO
        self.host, self.labels = host, labels
        folder.mkdir(exist_ok=True)
        self.paths = [str(folder / f'{i}.png') for i in range(count)]
        for i, path in enumerate(self.paths):
            Image.new('RGB', (WIDTH, HEIGHT), (20 * i,) * 3).save(path)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return dict(inputs=torch.zeros(1), data_samples=self.sample(i))

    def sample(self, i):
        meta = dict(img_path=self.paths[i], ori_shape=(HEIGHT, WIDTH))
        if self.host == 'mmseg':
            from mmseg.structures import SegDataSample

            sample = SegDataSample(metainfo=meta)
            if self.labels:
                sample.gt_sem_seg = halves(0)
            return sample
        from mmdet.structures import DetDataSample

        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(BOXES[:1]), labels=torch.tensor([0])
        )
        return sample


def halves(value):
    """A map whose right half has class 1."""
    data = torch.full((1, HEIGHT, WIDTH), value)
    data[:, :, WIDTH // 2 :] = 1
    return PixelData(data=data)


class Model(BaseModel):
    """Says class 1 everywhere, or two boxes of which one is unlikely."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            return dict(loss=self.weight.sum())
        for sample in data_samples:
            if 'gt_instances' in sample:
                sample.pred_instances = InstanceData(
                    bboxes=torch.tensor(BOXES),
                    scores=torch.tensor([0.9, 0.2]),
                    labels=torch.tensor([1, 1]),
                )
            else:
                sample.pred_sem_seg = halves(1)
        return data_samples


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


@pytest.fixture
def make_runner(tmp_path):

    def make(host='mmseg', count=9, labels=True, visualizer=None, **hook):
        pytest.importorskip(host)
        __import__(f'{host}.visualization')
        dataset = Pictures(tmp_path / 'pictures', count, host, labels)
        loader = dict(
            dataset=dataset,
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        )
        name = dict(mmseg='SegLocalVisualizer', mmdet='DetLocalVisualizer')
        return Runner(
            model=Model(),
            work_dir=str(tmp_path / 'work'),
            train_dataloader=loader,
            val_dataloader=loader,
            test_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
            val_cfg=dict(),
            test_cfg=dict(),
            val_evaluator=[Nothing()],
            test_evaluator=[Nothing()],
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
            default_hooks=dict(checkpoint=None),
            custom_hooks=[
                dict(type='mmdensecl.SamplePredictionsHook', **hook)
            ],
            visualizer=visualizer
            or dict(type=f'{host}.{name[host]}', name=tmp_path.name),
            default_scope=host,
            experiment_name=tmp_path.name,
        )

    scopes = dict(DefaultScope._instance_dict)
    yield make
    # Other tests must not find this one's default scope.
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scopes)


def drawn(tmp_path):
    folder = tmp_path / 'work' / 'predictions'
    return sorted(path.name for path in folder.glob('*'))


def pixels(tmp_path, name):
    path = tmp_path / 'work' / 'predictions' / name
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


class TestSegmentation:
    def test_train(self, make_runner, tmp_path):
        make_runner(num=3, height=120).train()
        assert drawn(tmp_path) == [
            f'{i:05d}_{kind}.png' for i in (0, 4, 8) for kind in ('gt', 'pred')
        ]
        truth = pixels(tmp_path, '00008_gt.png')
        predicted = pixels(tmp_path, '00008_pred.png')
        assert truth.shape == predicted.shape == (120, 180, 3)
        # Far from the labels' text: red and blue of the palette.
        left, right = truth[110, 5], truth[110, 175]
        assert left[0] > left[2] + 80 and right[2] > right[0] + 80
        left = predicted[110, 5]
        assert left[2] > left[0] + 80
        # The right picture: its grey shines through.
        darker = pixels(tmp_path, '00000_gt.png')
        assert darker[110, 5, 1] < truth[110, 5, 1]

    def test_test_set_without_labels(self, make_runner, tmp_path):
        make_runner(labels=False, num=2).test()
        assert drawn(tmp_path) == ['00000_pred.png', '00008_pred.png']


class TestDetection:
    def test_val(self, make_runner, tmp_path):
        make_runner('mmdet', num=2).val()
        assert drawn(tmp_path) == [
            f'{i:05d}_{kind}.png' for i in (0, 8) for kind in ('gt', 'pred')
        ]
        truth = pixels(tmp_path, '00000_gt.png')
        assert truth.shape == (320, 480, 3)
        scale = 320 / HEIGHT
        edge = slice(int(30 * scale), int(45 * scale)), int(40 * scale)
        red, _, blue = truth[edge].mean(0)
        assert red > blue + 50
        red, _, blue = pixels(tmp_path, '00000_pred.png')[edge].mean(0)
        assert blue > red + 50

    @pytest.mark.parametrize('threshold, shown', [(0.3, False), (0.1, True)])
    def test_threshold(self, make_runner, tmp_path, threshold, shown):
        make_runner('mmdet', num=1, score_thr=threshold).val()
        right = pixels(tmp_path, '00000_pred.png')[:, 270:]
        assert (right.max() > 50) == shown


def test_visualizer_that_draws_nothing(make_runner, tmp_path):
    nothing = dict(type='mmengine.Visualizer', name=tmp_path.name)
    with pytest.raises(TypeError, match='has "Visualizer".*SegLocal'):
        make_runner(visualizer=nothing).train()
