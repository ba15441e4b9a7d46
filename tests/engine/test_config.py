# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
from mmengine.config import Config

from mmdensecl.engine import override_data_root


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
