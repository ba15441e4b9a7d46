# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch

pytest.importorskip('mmdet')

from mmdet.models.roi_heads.shared_heads import ResLayer  # noqa: E402

from mmdensecl.transfer.mmdet import ResLayerExtraNorm  # noqa: E402


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

    @pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
    def test_frozen(self, norm):
        """All but the norm; mmdet's norm_eval would leave SyncBN training."""
        norm_cfg = dict(type=norm, requires_grad=True)
        head = ResLayerExtraNorm(50, stage=1, norm_cfg=norm_cfg, frozen=True)
        assert head.norm.num_features == 512
        assert isinstance(head.norm, type(head.res_layer[0].norm1))
        head.train()
        assert not any(m.training for m in head.res_layer.modules())
        assert head.norm.training
        assert not any(p.requires_grad for p in head.res_layer.parameters())
        assert all(p.requires_grad for p in head.norm.parameters())
        assert not head.train(False).norm.training
