# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

from mmdensecl.evaluation import probe_loop
from mmdensecl.registry import DATASETS, LOOPS


class Noise(Dataset):
    """Images of noise with two labels each, class i of n and class 3."""

    metainfo = dict(classes=('a', 'b', 'c', 'd'))

    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(count, 3, 32, 32, generator=generator) * 255

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        sample = DataSample().set_gt_label([i % 3])
        if i % 2:
            sample.set_field([3], 'gt_label_difficult', field_type='metainfo')
        return dict(inputs=self.images[i], data_samples=sample)


@pytest.fixture
def make_runner(tmp_path, tiny_cfg):
    """Function that gives a Runner with a probe of noise."""
    DATASETS.register_module('Noise', module=Noise)

    def make(sampler=None, test_loader=None, kind='KNNLoop', **test_cfg):
        sampler = sampler or dict(type='DefaultSampler', shuffle=False)
        loaders = [
            dict(
                batch_size=4,
                num_workers=0,
                sampler=dict(sampler),
                dataset=dict(type='mmdensecl.Noise', count=count, seed=count),
            )
            for count in (9, 6)
        ]
        loaders[1].update(test_loader or {})
        backbone = {**tiny_cfg()['backbone'], 'out_indices': (2, 3)}
        return Runner(
            model=dict(
                type='mmpretrain.ImageClassifier',
                data_preprocessor=dict(mean=[1.0] * 3, std=[2.0] * 3),
                backbone=backbone,
            ),
            work_dir=str(tmp_path),
            default_scope='mmpretrain',
            randomness=dict(seed=0),
            test_dataloader=loaders[1],
            test_evaluator=[],
            test_cfg=dict(
                type=f'mmdensecl.{kind}',
                train_dataloader=loaders[0],
                **test_cfg,
            ),
        )

    yield make
    DATASETS.module_dict.pop('Noise')


def spied(monkeypatch, kind='KNNLoop'):
    """What a probe is fitted to."""
    seen = []
    loop = LOOPS.get(f'mmdensecl.{kind}')
    monkeypatch.setattr(
        loop, 'fit', lambda self, *args: seen.extend(args) or {'score': 7.0}
    )
    return seen


class TestFeatures:
    @pytest.mark.parametrize('pool', [None, (3, 1)])
    def test_of_the_frozen_backbone(self, make_runner, monkeypatch, pool):
        """All images in order, last map, eval mode, preprocessed."""
        seen = spied(monkeypatch)
        runner = make_runner(pool=pool)
        metrics = runner.test()
        assert metrics == {'score': 7.0}
        backbone = copy.deepcopy(runner.model.backbone)
        backbone.eval()
        state = backbone.state_dict()
        for features, labels, count in ((*seen[:2], 9), (*seen[2:], 6)):
            with torch.no_grad():
                maps = backbone((Noise(count, count).images - 1) / 2)[-1]
            maps = (
                maps.mean((2, 3))
                if pool is None
                else F.avg_pool2d(maps, 3, 1).flatten(1)
            )
            torch.testing.assert_close(features, maps)
            assert not features.requires_grad
            assert labels.tolist() == [i % 3 for i in range(count)]
        assert seen[0].size(1) == (32 if pool is None else 32 * 4)
        assert int(state['bn1.num_batches_tracked']) == 0
        # mmengine's logs get what the loop measured.
        scalars = runner.message_hub.log_scalars
        assert scalars['test/score'].current() == 7

    def test_ranks_take_turns(self, make_runner, monkeypatch):
        """Rank r has every n-th image; the padding is cut off."""
        seen = spied(monkeypatch)
        monkeypatch.setattr(probe_loop, 'all_gather', lambda x: [x, x + 100])
        make_runner().test()
        assert seen[1].tolist() == [0, 100, 1, 101, 2, 102, 0, 100, 1]
        assert seen[3].tolist() == [0, 100, 1, 101, 2, 102]

    def test_weights_are_initialised(self, make_runner):
        """Runner.test alone would leave the initialiser out."""
        runner = make_runner(ks=(1,))
        runner.model.backbone.init_cfg = dict(
            type='Constant', layer='Conv2d', val=0.25
        )
        runner.test()
        assert (runner.model.backbone.conv1.weight == 0.25).all()
        for wrong in (
            dict(sampler=dict(type='DefaultSampler', shuffle=True)),
            dict(sampler=dict(type='InfiniteSampler', shuffle=False)),
            dict(test_loader=dict(drop_last=True)),
        ):
            with pytest.raises(
                ValueError, match='dataloader must give every image'
            ):
                make_runner(**wrong).test()

    def test_several_labels(self, make_runner, monkeypatch):
        seen = spied(monkeypatch, 'SVMLoop')
        make_runner(kind='SVMLoop').test()
        assert seen[3].tolist() == [
            [1, 0, 0, 0],
            [0, 1, 0, -1],
            [0, 0, 1, 0],
            [1, 0, 0, -1],
            [0, 1, 0, 0],
            [0, 0, 1, -1],
        ]
