# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import math

import numpy as np
import pytest
import torch

from mmdensecl.models import (
    BatchShuffle,
    DenseCL,
    KMeansCategoryHead,
    Match,
    NearestNeighbors,
    PrototypeCategoryHead,
    SyncedGenerator,
)
from mmdensecl.models.modules import l2_normalize
from mmdensecl.registry import MODELS

HEADS = dict(
    KM=dict(type='mmdensecl.KMeansCategoryHead', num_clusters=5),
    PM=dict(
        type='mmdensecl.PrototypeCategoryHead', num_prototypes=5, feat_dim=4
    ),
)
BOTH = pytest.mark.parametrize('head', HEADS)


def views_of_step(step, batch=3, size=32):
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(batch, 3, size, size, generator=generator)
        for _ in range(2)
    ]


@pytest.fixture
def build_dsc(tiny_cfg):

    def build(head='KM', num_samples=6, seed=0, **changes):
        torch.manual_seed(seed)
        model = MODELS.build(
            tiny_cfg(
                type='mmdensecl.DSC',
                category=HEADS[head],
                num_samples=num_samples,
                **changes,
            )
        )
        model.init_weights()
        model.category_randomness.seed = 7
        return model.train()

    return build


def take_steps(model, steps):
    """Outputs and gradients of each step, and the last weights."""
    optimizer = torch.optim.SGD(
        [x for x in model.parameters() if x.requires_grad],
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
    )
    history = []
    for step in steps:
        outputs = model.loss(views_of_step(step))
        optimizer.zero_grad()
        model.parse_losses(outputs)[0].backward()
        optimizer.step()
        gradients = {
            f'gradient of {name}': x.grad.clone()
            for name, x in model.named_parameters()
            if x.requires_grad
        }
        history.append({**outputs, **gradients})
    return history, model.state_dict()


def heads_loss(head, query, key, valid=None, seed=0):
    return head.loss(query, key, valid, torch.Generator().manual_seed(seed))


class TestStep:
    @BOTH
    def test_every_query_weight_has_a_gradient(self, build_dsc, head):
        """Also the prototypes, and also at category weight 0."""
        for weight in (0.5, 0.0):
            model = build_dsc(head, category_weight=weight)
            take_steps(model, [0])
            for name, x in model.named_parameters():
                assert (x.grad is None) == name.startswith('encoder_k.')
                if name == 'category_head.prototypes':
                    assert (x.grad.abs().sum() > 0) == (weight > 0)

    @BOTH
    def test_weights_of_the_losses(self, build_dsc, head):
        values = {}
        for loss_lambda, weight in ((0.5, 1.0), (0.25, 0.3), (1.0, 2.0)):
            model = build_dsc(
                head, loss_lambda=loss_lambda, category_weight=weight
            )
            out = model.loss(views_of_step(0))
            values[loss_lambda, weight] = [
                out[f'loss_{x}'].item()
                for x in ('global', 'dense', 'category')
            ]
        one = values[0.5, 1.0]
        whole = 2 * one[0], 2 * one[1], one[2]
        assert min(whole) > 0
        for (loss_lambda, weight), got in values.items():
            assert got == pytest.approx(
                [
                    (1 - loss_lambda) * whole[0],
                    loss_lambda * whole[1],
                    weight * whole[2],
                ]
            )

    @BOTH
    def test_one_neighbour_without_categories_is_densecl(
        self, build_dsc, build_tiny, head
    ):
        """Losses, gradients and weights of three steps, to the last bit.

        From the same seed.
        """
        model = build_dsc(
            head,
            category_weight=0.0,
            correspondence=dict(type='mmdensecl.NearestNeighbors', k=1),
        )
        after = torch.rand(1)
        torch.manual_seed(0)
        dense = build_tiny()
        assert type(dense) is DenseCL
        assert torch.rand(1) == after
        for name, x in dense.state_dict().items():
            assert torch.equal(model.state_dict()[name], x), name
        np.random.seed(0)  # what a shared seed is drawn from
        own, own_state = take_steps(model, range(3))
        np.random.seed(0)
        expected, state = take_steps(dense, range(3))
        for a, b in zip(own, expected, strict=True):
            for name, x in b.items():
                assert torch.equal(a[name], x), name
            assert a['loss_category'] == 0
        for name, x in state.items():
            assert torch.equal(own_state[name], x), name
        # Nothing of this holds by itself.
        four, _ = take_steps(build_dsc(head, category_weight=0.0), [0])
        assert four[0]['loss_global'] == expected[0]['loss_global']
        assert four[0]['loss_dense'] != expected[0]['loss_dense']

    @pytest.mark.parametrize('any_positive', [True, False])
    @BOTH
    def test_matches_that_do_not_count(self, build_dsc, head, any_positive):
        """Some of several positives, and all of them."""
        rule = NearestNeighbors(k=3)

        def some(query, key, views):
            index = rule(query, key, views).index
            weight = torch.rand(index.shape) * any_positive
            return Match(index, weight.where(weight > 0.5, 0))

        some.reads_backbone = True
        model = build_dsc(head)
        model.correspondence = some
        (outputs,), _ = take_steps(model, [0])
        assert all(torch.isfinite(x).all() for x in outputs.values())
        for name in ('loss_dense', 'loss_category'):
            assert (outputs[name] > 0) == any_positive
        for name in ('used', 'entropy', 'agreement'):
            assert 0 <= outputs[f'category_{name}'] <= 100

    def test_several_neighbours(self, build_dsc):
        """The mean over the k best keys of each cell, written as a loop."""
        model = build_dsc().double()
        queue = model.dense_queue.negatives.clone()
        with torch.no_grad():
            query, key = (
                model.encode(model.backbone, model.neck, x.double())
                for x in views_of_step(0)
            )
        match = model.correspondence(query, key, None)
        out = model.contrast_cells(query, key, match)
        losses = []
        for n in range(3):
            for i in range(16):
                feats = query.backbone_feats[n, :, i]
                cosine = (feats @ key.backbone_feats[n]).tolist()
                best = sorted(range(16), key=lambda j, x=cosine: -x[j])[:4]
                q = query.dense_proj[n, :, i]
                others = sum(math.exp(float(q @ x) / 0.2) for x in queue)
                for j in best:
                    e = math.exp(float(q @ key.dense_proj[n, :, j]) / 0.2)
                    losses.append(-math.log(e / (e + others)))
        assert out['loss_dense'].item() == pytest.approx(
            0.5 * sum(losses) / len(losses)
        )


class TestAnchors:
    def test_partners_are_the_best_matches(self, build_dsc, monkeypatch):
        """Of distinct cells, others of each image and in each step."""
        model, seen = build_dsc(), []
        for owner, name in (
            (model, 'draw_anchors'),
            (model, 'contrast_cells'),
            (model.category_head, 'loss'),
        ):
            method = getattr(owner, name)

            def spy(*args, method=method):
                seen.append((args, method(*args)))
                return seen[-1][1]

            monkeypatch.setattr(owner, name, spy)
        model.loss(views_of_step(0))
        calls = {len(args): (args, out) for args, out in seen}
        anchors = calls[2][1]
        features, partners, match = calls[3][0]
        query, key, valid, _ = calls[4][0]
        assert valid is None
        rows = {tuple(sorted(x)) for x in anchors.tolist()}
        assert len(rows) == 3 and all(len(set(x)) == 6 for x in rows)
        for n in range(3):
            for i, cell in enumerate(anchors[n]):
                expected = features.dense_proj[n, :, cell]
                assert torch.equal(query[6 * n + i], expected)
                partner = match.index[n, cell, 0]
                expected = partners.dense_proj[n, :, partner]
                assert torch.equal(key[6 * n + i], expected)
        seen.clear()
        model.loss(views_of_step(0))
        again = next(out for args, out in seen if len(args) == 2)
        assert not torch.equal(again, anchors)


class TestResume:
    @BOTH
    def test_goes_on_to_the_last_bit(self, build_dsc, head, tmp_path):
        model = build_dsc(head)
        take_steps(model, range(3))
        torch.save(model.state_dict(), tmp_path / 'model.pth')
        resumed = build_dsc(head, seed=99)
        resumed.category_randomness.seed = None
        resumed.load_state_dict(torch.load(tmp_path / 'model.pth'))
        (own, own_state), (expected, state) = (
            take_steps(x, range(3, 5)) for x in (resumed, model)
        )
        for a, b in zip(own, expected, strict=True):
            for name, x in b.items():
                assert torch.equal(a[name], x), name
        for name, x in state.items():
            assert torch.equal(own_state[name], x), name


class TestSyncedGenerator:
    def test_batch_shuffle_is_one(self):
        """The numbers that checkpoints of before continue with."""
        shuffle = BatchShuffle()
        assert isinstance(shuffle, SyncedGenerator)
        shuffle.seed = 7
        for step in range(2):
            generator = torch.Generator().manual_seed(7 * 1_000_003 + step)
            x, inverse = shuffle.shuffle(torch.arange(20), virtual_ranks=2)
            assert torch.equal(x, torch.randperm(20, generator=generator))
            assert torch.equal(x[inverse], torch.arange(20))
        assert list(shuffle.state_dict()) == ['_extra_state']
        assert shuffle.state_dict()['_extra_state'].tolist() == [7, 2]


class TestKMeansHead:
    @staticmethod
    def points():
        """Two pictures of three directions; the partner of a is a."""
        directions = torch.eye(8)[[0, 1, 2, 0, 1, 2]]
        noise = 0.02 * torch.randn(2, 6, 8)
        return l2_normalize(directions + noise[0]), l2_normalize(
            directions + noise[1]
        )

    def test_against_the_known_categories(self):
        """Positives are the two key points of the anchor's direction."""
        query, key = self.points()
        head = KMeansCategoryHead(num_clusters=3, temperature=0.5)
        loss, monitors = heads_loss(head, query, key)
        expected = []
        for i in range(6):
            e = [math.exp(float(query[i] @ k) / 0.5) for k in key]
            expected += [-math.log(e[j] / sum(e)) for j in (i, (i + 3) % 6)]
        assert loss.item() == pytest.approx(sum(expected) / 12)
        values = {k: x.item() for k, x in monitors.items()}
        assert values == pytest.approx(
            dict(
                category_used=100, category_entropy=100, category_agreement=100
            )
        )

    def test_valid(self):
        """Anchors without a partner drop out; their points stay."""
        query, key = self.points()
        head = KMeansCategoryHead(num_clusters=3)
        valid = torch.tensor([True, False, False, True, False, False])
        query = query.requires_grad_()
        loss, _ = heads_loss(head, query, key, valid)
        loss.backward()
        assert (query.grad[valid].abs().sum(dim=1) > 0).all()
        assert (query.grad[~valid] == 0).all()
        alone = [
            heads_loss(head, query.detach(), key, torch.arange(6) == i)[
                0
            ].item()
            for i in (0, 3)
        ]
        assert loss.item() == pytest.approx(sum(alone) / 2)


class TestPrototypeHead:
    def test_against_loops(self):
        """Swapped prediction, from the definition, in float64."""
        head = PrototypeCategoryHead(3, 4, 0.3, 2, 0.5).double()
        with torch.no_grad():  # they are normalised at use
            head.prototypes.mul_(torch.tensor([[2.0], [0.3], [7.0]]))
        query, key = (
            l2_normalize(torch.randn(5, 4).double()) for _ in range(2)
        )
        loss, _ = heads_loss(head, query, key)
        c = [x / x.norm() for x in head.prototypes.detach()]
        q = [[math.exp(float(k @ x) / 0.3) for x in c] for k in key]
        for _ in range(2):
            columns = [sum(row[j] for row in q) for j in range(3)]
            q = [[row[j] / columns[j] for j in range(3)] for row in q]
            q = [[x / sum(row) for x in row] for row in q]
        expected = 0.0
        for i in range(5):
            e = [math.exp(float(query[i] @ x) / 0.5) for x in c]
            expected -= sum(
                q[i][j] * math.log(e[j] / sum(e)) for j in range(3)
            )
        assert loss.item() == pytest.approx(expected / 5)

    def test_no_gradient_into_the_assignment(self):
        """Through the anchors alone, or prototypes would chase the keys."""
        head = PrototypeCategoryHead(3, 4)
        key = l2_normalize(torch.randn(5, 4)).requires_grad_()
        query = torch.zeros(5, 4, requires_grad=True)
        heads_loss(head, query, key)[0].backward()
        assert key.grad is None
        assert (head.prototypes.grad == 0).all()


@pytest.mark.parametrize(
    'head', [KMeansCategoryHead(3), PrototypeCategoryHead(3, 8)], ids=HEADS
)
class TestPrecision:
    def test_autocast_is_left(self, head):
        x = l2_normalize(torch.randn(12, 8))
        plain, _ = heads_loss(head, x, x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss, _ = heads_loss(head, x, x)
        assert torch.equal(loss, plain)
        half, _ = heads_loss(head, x.bfloat16(), x.bfloat16())
        assert half.dtype == torch.float32
