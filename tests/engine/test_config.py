# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
from mmengine.config import Config

from mmdensecl.engine import override_data_root, set_pretrained


def test_moves_every_path_below_the_root():
    cfg = Config(
        dict(
            data_root='data/coco',
            train_dataloader=dict(
                dataset=dict(data_root='data/coco/train2017')),
            many=[dict(ann='data/coco/a.json'), ('data/coco', 'data/cocoa')],
            count=3))
    override_data_root(cfg, '/mnt/x/')
    assert cfg.data_root == '/mnt/x'
    assert cfg.train_dataloader.dataset.data_root == '/mnt/x/train2017'
    assert cfg.many[0].ann == '/mnt/x/a.json'
    # A longer name is another folder.
    assert tuple(cfg.many[1]) == ('/mnt/x', 'data/cocoa')
    assert cfg.count == 3


def test_nothing_to_move():
    with pytest.raises(KeyError, match='defines no data_root'):
        override_data_root(Config(dict(model=dict())), '/mnt/x')


def pretrained(**kwargs):
    return dict(
        type='mmdensecl.PretrainedBackbone', checkpoint='a.pth', **kwargs)


@pytest.fixture
def detector():
    return Config(
        dict(
            model=dict(
                backbone=dict(type='ResNet', init_cfg=pretrained()),
                neck=dict(init_cfg=dict(type='Xavier')),
                roi_head=[
                    dict(
                        shared_head=dict(init_cfg=[
                            dict(type='Kaiming'),
                            pretrained(allow_random=['norm'])
                        ]))
                ])))


def test_pretrained_everywhere(detector):
    set_pretrained(detector, 'b.pth')
    model = detector.model
    assert model.backbone.init_cfg == {**pretrained(), 'checkpoint': 'b.pth'}
    others, ours = model.roi_head[0].shared_head.init_cfg
    assert others == dict(type='Kaiming')
    assert (ours.checkpoint, ours.allow_random) == ('b.pth', ['norm'])
    assert model.neck.init_cfg == dict(type='Xavier')


def test_no_pretrained(detector):
    set_pretrained(detector, 'none')
    model = detector.model
    assert 'init_cfg' not in model.backbone
    assert model.roi_head[0].shared_head.init_cfg == [dict(type='Kaiming')]
    assert model.neck.init_cfg == dict(type='Xavier')


@pytest.mark.parametrize('checkpoint', ['b.pth', 'none'])
@pytest.mark.parametrize('content', [
    dict(),
    dict(model=dict(backbone=dict(init_cfg=dict(type='Pretrained')))),
])
def test_no_place_for_pretrained(checkpoint, content):
    with pytest.raises(KeyError, match='PretrainedBackbone'):
        set_pretrained(Config(content), checkpoint)
