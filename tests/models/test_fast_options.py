# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""channels_last and compile_encoders change how fast, not what."""

import copy

import pytest
import torch
from loop_densecl import TinyBackbone

BOTH = pytest.mark.parametrize('name', ['DenseCL', 'MoCoV2'])


def views(batch=4, size=32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, 3, size, size, generator=generator)
        for _ in range(2)
    ]


def steps(model, number=3):
    """Losses of a few steps of training."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.01
    )
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        loss, _ = model.parse_losses(model.loss(views()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Two convolutions: a ResNet takes long to compile.
SMALL = dict(type=TinyBackbone, channels=32)


def twins(build_tiny, name, shared=None, **options):
    """A model without any, and one with options and the same weights."""
    shared = shared or {}
    plain = build_tiny(name, channels_last=False, **shared)
    other = build_tiny(name, **shared, **options)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    return plain, other


def convolutions(model):
    return {
        name: x
        for name, x in model.state_dict().items()
        if x.dim() == 4 and min(x.shape[1:]) > 1  # else both at once
    }


class TestChannelsLast:
    @BOTH
    def test_same_training(self, build_tiny, name):
        """In this layout all through, also after a step and a checkpoint."""
        plain, other = twins(build_tiny, name, channels_last=True)
        assert steps(other) == pytest.approx(steps(plain), rel=1e-4)
        found = convolutions(other)
        assert any('encoder_k' in x for x in found)
        assert any('encoder_k' not in x for x in found)
        for key, x in found.items():
            assert x.is_contiguous(memory_format=torch.channels_last), key

    @BOTH
    def test_a_seed_means_the_same_weights(self, build_tiny, name):
        found = []
        for channels_last in (False, True):
            torch.manual_seed(3)
            model = build_tiny(name, channels_last=channels_last)
            assert all(
                x.is_contiguous(memory_format=model.memory_format)
                for x in convolutions(model).values()
            )
            found.append(model.state_dict())
        for key, x in found[0].items():
            assert torch.equal(x, found[1][key]), key

    @pytest.mark.parametrize(
        'device, expected', [('cpu', True), ('cuda', False)]
    )
    def test_auto(self, build_tiny, monkeypatch, device, expected):
        monkeypatch.setattr('mmdensecl.models.moco.get_device', lambda: device)
        for x in convolutions(build_tiny()).values():
            assert x.is_contiguous() != expected
            assert (
                x.is_contiguous(memory_format=torch.channels_last) == expected
            )


class TestCompile:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        """Torch gives up on code that it has compiled for several models."""
        torch.compiler.reset()

    def test_same_training(self, build_tiny):
        """And checkpoints do not know; a copy can be made and trained."""
        plain, other = twins(
            build_tiny,
            'DenseCL',
            dict(backbone=SMALL),
            # Traced, not generated anew: gpu/test_gpu.py has the rest.
            compile_encoders=dict(backend='eager'),
        )
        assert steps(other) == pytest.approx(steps(plain), rel=1e-4)
        assert list(other.state_dict()) == list(plain.state_dict())
        assert steps(copy.deepcopy(other), 1)

    def test_both_encoders_are_compiled_once(self, build_tiny):
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        model = build_tiny(
            backbone=SMALL, compile_encoders=dict(backend=backend)
        )
        assert not graphs  # not before the first step
        steps(model, 1)
        first = len(graphs)
        assert first >= 4  # two backbones, two necks
        steps(model, 3)
        assert len(graphs) == first


class TestVirtualRanks:
    def test_resumes_with_the_same_shuffles(self, build_tiny):
        """What is saved is all that the next step depends on."""
        model = build_tiny(virtual_ranks=2)
        steps(model, 2)
        other = build_tiny(virtual_ranks=2)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert steps(other, 2) == steps(model, 2)
