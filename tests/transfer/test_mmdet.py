# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch

pytest.importorskip('mmdet')

from mmdet.models.roi_heads.shared_heads import ResLayer  # noqa: E402

from mmdensecl.transfer.mmdet import ResLayerExtraNorm  # noqa: E402


def changed_by_a_step(head):
    """Names of the tensors that a step of SGD changes."""
    before = {k: v.clone() for k, v in head.state_dict().items()}
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    head.train()
    out = head(torch.rand(4, head.in_channels, 4, 4))
    out.pow(3).mean().backward()
    optimizer.step()
    return {
        k
        for k, v in head.state_dict().items()
        if not torch.equal(v, before[k])
    }


@pytest.fixture(params=['BN', 'SyncBN'])
def norm_cfg(request):
    return dict(type=request.param, requires_grad=True)


class TestResLayerExtraNorm:
    def test_is_the_stage_and_a_norm(self):
        """In the terms of mmdet's own layer, in train and in test mode."""
        head = ResLayerExtraNorm(18, stage=1)
        plain = ResLayer(18, stage=1, norm_eval=False)
        plain.load_state_dict(
            {
                k: v
                for k, v in head.state_dict().items()
                if not k.startswith('norm.')
            }
        )
        x = torch.rand(2, 64, 8, 8)
        for mode in (True, False):
            head.train(mode), plain.train(mode)
            torch.nn.init.uniform_(head.norm.weight)
            assert torch.equal(head(x), head.norm(plain(x)))

    @pytest.mark.parametrize(
        'depth, stage, channels', [(50, 3, 2048), (18, 3, 512), (50, 1, 512)]
    )
    def test_channels(self, depth, stage, channels, norm_cfg):
        head = ResLayerExtraNorm(depth, stage=stage, norm_cfg=norm_cfg)
        assert head.norm.num_features == channels
        assert isinstance(head.norm, type(head.res_layer[0].norm1))

    @pytest.mark.parametrize('frozen', [False, True])
    def test_frozen(self, frozen):
        head = ResLayerExtraNorm(18, stage=1, frozen=frozen)
        head.in_channels = 64
        changed = changed_by_a_step(head)
        extra = {k for k in head.state_dict() if k.startswith('norm.')}
        assert changed == (extra if frozen else set(head.state_dict()))

    def test_frozen_with_sync_bn(self, norm_cfg):
        """mmdet's norm_eval would leave SyncBN in train mode."""
        head = ResLayerExtraNorm(
            18, stage=1, norm_cfg=norm_cfg, frozen=True
        ).train()
        assert not any(m.training for m in head.res_layer.modules())
        assert head.norm.training
        assert not any(p.requires_grad for p in head.res_layer.parameters())
        assert all(p.requires_grad for p in head.norm.parameters())
        assert not head.train(False).norm.training
