# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Starting from a checkpoint that is not a whole one of ours."""

import pytest
import torch


@pytest.mark.parametrize('name', ['DenseCL', 'MoCoV2'])
def test_both_encoders_start_from_a_bare_backbone(build_tiny, name):
    """mmengine loads after init_weights, and with strict=False."""
    source, model = build_tiny(name), build_tiny(name)
    neck = {k: v.clone() for k, v in model.neck.state_dict().items()}
    bare = {
        f'backbone.{k}': v + 1 for k, v in source.backbone.state_dict().items()
    }
    model.load_state_dict(dict(bare), strict=False)
    for part in (model.backbone, model.encoder_k.backbone):
        for key, x in part.state_dict().items():
            assert torch.equal(x, bare[f'backbone.{key}'])
    for part in (model.neck, model.encoder_k.neck):
        for key, x in part.state_dict().items():
            assert torch.equal(x, neck[key])


def test_matches_are_made_in_full_precision(build_tiny):
    """Also under AMP, where bmm would round to half."""
    model, seen = build_tiny(), []

    class Spy(type(model.correspondence)):
        def __call__(self, query, key, views=None):
            seen.append(
                (torch.is_autocast_enabled('cpu'), query.backbone_feats.dtype)
            )
            return super().__call__(query, key, views)

    model.correspondence = Spy()
    views = [torch.rand(2, 3, 32, 32) for _ in range(2)]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model.loss(views)
    assert seen == [(False, torch.float32)]
