# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""mmpretrain's DenseCL and MoCo-v2 with one line changed."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmpretrain.models import selfsup

from mmdensecl.registry import MODELS

STOCK = {
    'DenseCL': 'densecl/densecl_resnet50_8xb32-coslr-200e_in1k.py',
    'MoCoV2': 'mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py',
}
HOST = dict(DenseCL=selfsup.DenseCL, MoCoV2=selfsup.MoCo)
LOSSES = dict(
    DenseCL={'loss_single': 'loss_global', 'loss_dense': 'loss_dense'},
    MoCoV2={'loss': 'loss_global'},
)


def stock(name: str) -> Config:
    """The host's config, made small; the model's type is still its own."""
    cfg = get_config(f'mmpretrain::{STOCK[name]}')
    cfg.model.backbone.update(depth=18, stem_channels=4, base_channels=4)
    cfg.model.neck.update(in_channels=32, hid_channels=8, out_channels=4)
    cfg.model.update(queue_len=8, feat_dim=4)
    return cfg


@pytest.fixture(params=list(STOCK))
def pair(request):
    """The host's model and ours, of the same numbers, in float64."""
    name = request.param
    cfg = stock(name).model
    cfg.data_preprocessor = dict(type='SelfSupDataPreprocessor')
    own_cfg = copy.deepcopy(cfg)
    own_cfg.type = f'mmdensecl.{name}'
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        cfg.pop('type')
        host = HOST[name](**cfg)
        own = MODELS.build(own_cfg)
    host.init_weights()
    return name, host.double().train(), own.double().train()


def views():
    return [torch.randn(4, 3, 64, 64).double() for _ in range(2)]


def host_losses(name, host, batch):
    losses = host.loss([x.clone() for x in batch], None)
    return {own: losses[key] for key, own in LOSSES[name].items()}


class TestStockConfigs:
    def test_losses_and_gradients(self, pair):
        """A checkpoint of the host goes on as a whole, and to its numbers."""
        name, host, own = pair
        own.load_state_dict(host.state_dict(), strict=False)
        for _ in range(3):  # the queue of eight wraps around
            batch = views()
            expected = host_losses(name, host, batch)
            actual = own.loss(batch, None)
            for key, x in expected.items():
                torch.testing.assert_close(actual[key], x)
            sum(expected.values()).backward()
            sum(actual[key] for key in expected).backward()
            for n, x in host.backbone.named_parameters():
                torch.testing.assert_close(
                    dict(own.backbone.named_parameters())[n].grad, x.grad
                )

    def test_another_loss_is_refused(self):
        cfg = stock('MoCoV2').model
        cfg.type = 'mmdensecl.MoCoV2'
        cfg.head.loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1)
        with (
            DefaultScope.overwrite_default_scope('mmpretrain'),
            pytest.raises(ValueError, match='temperature=0.2'),
        ):
            MODELS.build(cfg)


class TestTrainingCheckpoints:
    def test_goes_on_whole(self, pair):
        """Both encoders, statistics, queues and pointers."""
        name, host, own = pair
        host_losses(name, host, views())
        missing, unexpected = own.load_state_dict(
            host.state_dict(), strict=False
        )
        left = {x for x in missing if not x.endswith('_extra_state')}
        assert not left and not unexpected
        torch.testing.assert_close(own.queue.negatives, host.queue.t())
        assert own.queue.pointer == host.queue_ptr == 4
        assert own.queue.fill == 1
        if name == 'DenseCL':
            torch.testing.assert_close(
                own.dense_queue.negatives, host.queue2.t()
            )
        backbone, neck = host.encoder_k.module
        for ours, theirs in (
            (own.encoder_k.backbone, backbone),
            (own.encoder_k.neck, neck),
        ):
            theirs = theirs.state_dict()
            for key, x in ours.state_dict().items():
                torch.testing.assert_close(x, theirs[key])

    def test_queue_of_another_length(self, pair):
        _, host, own = pair
        state = host.state_dict() | dict(queue=torch.zeros(4, 16))
        with pytest.raises(ValueError, match='queue_len=16'):
            own.load_state_dict(state, strict=False)
