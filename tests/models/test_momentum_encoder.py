# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import warnings

import pytest
import torch
import torch.nn as nn

from mmdensecl.models import MomentumEncoder


def make_parts():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    return backbone, nn.Linear(4, 2)


def fill(module, value):
    with torch.no_grad():
        for x in module.parameters():
            x.fill_(value)


class TestMomentumEncoder:
    def test_starts_equal_and_apart(self):
        backbone, neck = make_parts()
        encoder = MomentumEncoder(backbone, neck)
        for own, module in (
            (encoder.backbone, backbone),
            (encoder.neck, neck),
        ):
            for a, b in zip(
                own.state_dict().values(),
                module.state_dict().values(),
                strict=True,
            ):
                assert torch.equal(a, b)
                assert a.data_ptr() != b.data_ptr()
        assert not any(x.requires_grad for x in encoder.parameters())
        assert all(x.requires_grad for x in backbone.parameters())

    def test_papers_momentum(self):
        """0.001 is the paper's m = 0.999, after one step and after 50."""
        backbone, neck = make_parts()
        encoder = MomentumEncoder(backbone.double(), neck.double())
        fill(encoder, 1.0)
        fill(backbone, 2.0)
        fill(neck, 2.0)
        for step in range(1, 51):
            encoder.update(backbone, neck)
            for x in encoder.parameters():
                torch.testing.assert_close(
                    x.data,
                    torch.full_like(x, 2 - 0.999**step),
                    rtol=1e-14,
                    atol=0,
                )

    def test_copy_from_takes_statistics_too(self):
        backbone, neck = make_parts()
        encoder = MomentumEncoder(backbone, neck)
        backbone(torch.randn(4, 3, 2, 2) + 3)
        fill(neck, 7.0)
        encoder.copy_from(backbone, neck)
        assert torch.equal(
            encoder.backbone[1].running_mean, backbone[1].running_mean
        )
        assert (encoder.neck.weight == 7).all()

    def test_warns_of_the_papers_convention(self):
        with pytest.warns(
            UserWarning,
            match='momentum=0.999 is the weight of '
            'the query.*written momentum=0.001',
        ):
            MomentumEncoder(*make_parts(), momentum=0.999)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            MomentumEncoder(*make_parts(), momentum=0.01)
