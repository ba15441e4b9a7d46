# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Three whole steps against an independent loop version, in float64."""

import pytest
import torch
from loop_densecl import (
    LoopDenseCL,
    LoopMoCoV2,
    TinyBackbone,
    cells_of,
    project,
)
from loop_densecl import match as loop_match
from mmpretrain.models import MoCoV2Neck

from mmdensecl.models import DenseCL, DenseCLNeck, MoCoV2
from mmdensecl.models.correspondence import nearest_cells
from mmdensecl.models.modules import l2_normalize

CHANNELS, HIDDEN, DIM, QUEUE = 6, 5, 4, 7
# The second batch wraps around the queue of 7, the last one is smaller.
BATCHES = (3, 5, 2)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def perturb(module, scale=0.1):
    with torch.no_grad():
        for x in module.parameters():
            x.add_(scale * torch.randn_like(x))


def prepare(model):
    """Float64, train mode, and a key encoder unlike the query's."""
    model = model.double().train()
    perturb(model.encoder_k)
    return model


def build_densecl(**kwargs):
    num_grid = kwargs.pop('num_grid', None)
    return prepare(
        DenseCL(
            backbone=TinyBackbone(CHANNELS),
            neck=DenseCLNeck(CHANNELS, HIDDEN, DIM, num_grid=num_grid),
            queue_len=QUEUE,
            feat_dim=DIM,
            **kwargs,
        )
    )


def parts(model):
    key = model.encoder_k
    return (
        model.backbone,
        model.neck,
        key.backbone,
        key.neck,
        model.queue.negatives,
    )


def loop_of(model, momentum=0.999, loss_lambda=0.5, num_grid=None, **kwargs):
    """The loop version that starts where a DenseCL is."""
    return LoopDenseCL(
        *parts(model),
        dense_queue=model.dense_queue.negatives,
        momentum=momentum,
        loss_lambda=loss_lambda,
        num_grid=num_grid,
        **kwargs,
    )


def assert_three_steps_agree(model, loop):
    """Losses, gradients, queues, pointers and both encoders."""
    query = loop.query_parameters()
    optimizers = [
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
        for parameters in (
            [*model.backbone.parameters(), *model.neck.parameters()],
            query.values(),
        )
    ]
    for size in BATCHES:
        views = [torch.randn(size, 3, 8, 8).double() for _ in range(2)]
        losses, expected = model.loss(views), loop.step(*views)
        assert {name for name in losses if 'loss' in name} == set(expected)
        for name, x in expected.items():
            assert_close(losses[name], x)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.parse_losses(losses)[0].backward()
        sum(expected.values()).backward()
        own = dict(model.named_parameters())
        assert set(query) == {n for n in own if not n.startswith('encoder_k')}
        for name, x in query.items():
            assert_close(
                own[name].grad,
                torch.zeros_like(x) if x.grad is None else x.grad,
            )
        for optimizer in optimizers:
            optimizer.step()
        for name, x in query.items():
            assert_close(own[name], x)
        for name, x in loop.key_parameters().items():
            assert_close(own[f'encoder_k.{name}'].data, x.data)
            assert own[f'encoder_k.{name}'].grad is None
        buffers = dict(model.named_buffers())
        for name, x in loop.key_backbone.named_buffers():
            assert_close(buffers[f'encoder_k.backbone.{name}'], x)
        assert_close(model.queue.negatives, torch.stack(loop.queue.rows))
        assert model.queue.pointer == loop.queue.pointer
        if isinstance(loop, LoopDenseCL):
            assert_close(
                model.dense_queue.negatives, torch.stack(loop.dense_queue.rows)
            )
            assert model.dense_queue.pointer == loop.dense_queue.pointer


class TestAgainstLoops:
    @pytest.mark.parametrize(
        'loss_lambda, num_grid', [(0, None), (0.3, None), (0.3, 3), (1, 3)]
    )
    def test_densecl(self, loss_lambda, num_grid):
        options = dict(loss_lambda=loss_lambda, num_grid=num_grid)
        model = build_densecl(momentum=0.01, **options)
        loop = loop_of(model, momentum=0.99, **options)
        assert_three_steps_agree(model, loop)

    def test_densecl_defaults(self):
        # lambda 0.5, m 0.999 and temperature 0.2 are the published ones.
        model = build_densecl()
        loop = loop_of(model)
        assert_three_steps_agree(model, loop)

    def test_densecl_temperature(self):
        loss = dict(type='mmdensecl.InfoNCE', temperature=0.5)
        head = dict(type='mmdensecl.ContrastiveHead', loss=loss)
        model = build_densecl(head=head)
        loop = loop_of(model, temperature=0.5)
        assert_three_steps_agree(model, loop)

    @pytest.mark.parametrize('count', [1, 3])
    def test_negatives_from_cells(self, count):
        """A seed and the number of the step alone decide which cells."""
        model = build_densecl(dense_negatives='cells', cells_per_image=count)
        model.cell_sampler.seed = 5
        draws = []
        for step, size in enumerate(BATCHES):
            generator = torch.Generator().manual_seed(5 * 1_000_003 + step)
            lots = torch.rand(size, 16, generator=generator)
            draws.append(lots.argsort(dim=1, descending=True)[:, :count])
        loop = loop_of(model, draws=[x.tolist() for x in draws])
        assert_three_steps_agree(model, loop)

    @pytest.mark.parametrize('power', [1.0, 4.0])
    def test_matches_weighted_by_similarity(self, power):
        rule = dict(type='mmdensecl.BackboneSimilarity', weight_power=power)
        model = build_densecl(correspondence=rule)
        loop = loop_of(model, weight_power=power)
        assert_three_steps_agree(model, loop)

    def test_mocov2(self):
        model = prepare(
            MoCoV2(
                backbone=TinyBackbone(CHANNELS),
                neck=MoCoV2Neck(CHANNELS, HIDDEN, DIM),
                queue_len=QUEUE,
                feat_dim=DIM,
                momentum=0.01,
            )
        )
        loop = LoopMoCoV2(*parts(model), momentum=0.99)
        assert_three_steps_agree(model, loop)

    @pytest.mark.parametrize('num_grid', [None, 1, 3, 5])
    def test_neck(self, num_grid):
        neck = DenseCLNeck(CHANNELS, HIDDEN, DIM, num_grid=num_grid).double()
        maps = torch.randn(2, CHANNELS, 4, 5).double()
        vector, grid, pooled = neck((maps,))
        weights = dict(neck.named_parameters())
        for n in range(2):
            everywhere = sum(cells_of(maps[n])) / 20
            dense = [
                project(cell, weights, 'mlp2')
                for cell in cells_of(maps[n], num_grid)
            ]
            assert_close(vector[n], project(everywhere, weights, 'mlp'))
            assert_close(grid[n], torch.stack(dense, dim=1))
            assert_close(pooled[n], sum(dense) / len(dense))

    def test_matching(self):
        query = torch.randn(3, CHANNELS, 12).double()
        key = torch.randn(3, CHANNELS, 9).double()
        expected = [
            loop_match(q.unbind(1), k.unbind(1))
            for q, k in zip(query, key, strict=True)
        ]
        index = nearest_cells(query, l2_normalize(key))
        assert index.tolist() == expected
        # The query's length is of no consequence.
        assert (
            nearest_cells(l2_normalize(query), l2_normalize(key)).tolist()
            == expected
        )
