# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import math
from functools import partial

import pytest
import torch

from mmdensecl.models import (
    BackboneSimilarity,
    BalancedSimilarity,
    Features,
    GeometricMatch,
    MutualNearestNeighbor,
    NearestNeighbors,
    ProjectionSimilarity,
    RandomMatch,
)
from mmdensecl.models.correspondence import mutual_nearest_cells
from mmdensecl.models.modules import l2_normalize


def one_hot(*channels, num=4):
    """One picture (1, num, P) whose cell p is one-hot at channels[p]."""
    return torch.eye(num)[list(channels)].t()[None]


def features(grid=None, cells=None, shape=None):
    some = grid if grid is not None else cells
    return Features(some[:, :, 0], grid, some[:, :, 0], cells, shape)


class TestMutualNearestCells:
    def test_against_loops(self):
        query = l2_normalize(torch.randn(3, 5, 7))
        key = l2_normalize(torch.randn(3, 5, 4))
        match = mutual_nearest_cells(query, key)
        for n in range(3):
            cosine = [
                [float(query[n, :, i] @ key[n, :, j]) for j in range(4)]
                for i in range(7)
            ]
            for i in range(7):
                j = max(range(4), key=lambda j: cosine[i][j])
                back = max(range(7), key=lambda i: cosine[i][j])
                assert match.index[n, i] == j
                assert match.valid[n, i] == (back == i)
        assert match.valid.any(dim=1).all()
        assert not match.valid.all()


class TestRules:
    """Cells and projections disagree, so each rule shows what it reads."""

    def setup_method(self):
        self.query = features(one_hot(0, 1, 2), one_hot(0, 1, 2), shape=(1, 3))
        self.key = features(one_hot(2, 0, 1), one_hot(1, 2, 0), shape=(1, 3))

    @pytest.mark.parametrize(
        'rule, index',
        [
            (BackboneSimilarity, [2, 0, 1]),
            (partial(NearestNeighbors, k=1), [2, 0, 1]),
            (MutualNearestNeighbor, [2, 0, 1]),
            (ProjectionSimilarity, [1, 2, 0]),
            (RandomMatch, None),
            (GeometricMatch, [0, 1, 2]),
        ],
    )
    def test_what_each_reads(self, rule, index):
        """What a rule does not ask for may be missing."""
        rule, query, key = rule(), self.query, self.key
        if not rule.reads_backbone:
            query, key = (
                x._replace(backbone_feats=None) for x in (query, key)
            )
        views = torch.tensor([[[0.0, 0, 3, 1, 0]] * 2])
        match = rule(query, key, views)
        assert match.index.shape == (1, 3)
        assert index is None or match.index.tolist() == [index]
        assert match.valid is None or match.valid.all()
        reads = index == [2, 0, 1]
        assert rule.reads_backbone is reads

    def test_random_match(self):
        query = features(torch.zeros(50, 2, 8), shape=(2, 4))
        key = features(torch.zeros(50, 2, 4), shape=(2, 2))
        match = RandomMatch()(query, key, None)
        assert match.index.shape == (50, 8)
        assert match.index.dtype == torch.long
        # 400 draws of four cells: about 100 of each, std 9.
        counts = match.index.flatten().bincount(minlength=4)
        assert len(counts) == 4
        assert ((counts - 100).abs() < 45).all()
        assert match.valid is None
        assert not torch.equal(
            match.index, RandomMatch()(query, key, None).index
        )


class TestWeightedMatches:
    def test_by_similarity(self):
        """Cosines 1, 0.6 and -1; what is unlike does not count."""
        query = torch.tensor([[[1.0, 0.6, -1.0], [0.0, 0.8, 0.0]]])
        key = torch.tensor([[[1.0], [0.0]]])
        rule = BackboneSimilarity(weight_power=2.0)
        match = rule(features(cells=query), features(cells=key), None)
        assert match.index.tolist() == [[0, 0, 0]]
        torch.testing.assert_close(
            match.weight, torch.tensor([[1.0, 0.36, 0.0]])
        )
        assert match.valid.tolist() == [[True, True, False]]


class TestBalancedSimilarity:
    def test_against_loops(self):
        """Columns and rows of the exponentials are normalised in turn."""
        query, key = (
            l2_normalize(torch.rand(2, 5, 6).double()) for _ in range(2)
        )
        match = BalancedSimilarity(epsilon=0.2, num_iters=4)(
            features(cells=query), features(cells=key), None
        )
        for n in range(2):
            table = [
                [
                    math.exp(float(query[n, :, i] @ key[n, :, j]) / 0.2)
                    for j in range(6)
                ]
                for i in range(6)
            ]
            for _ in range(4):
                totals = [sum(row[j] for row in table) for j in range(6)]
                table = [
                    [x / t for x, t in zip(row, totals, strict=True)]
                    for row in table
                ]
                table = [[x / sum(row) for x in row] for row in table]
            expected = [row.index(max(row)) for row in table]
            assert match.index[n].tolist() == expected


class TestGeometricMatch:
    @staticmethod
    def match(query_view, key_view, query_shape=(2, 2), key_shape=(2, 2)):
        query, key = (
            features(torch.zeros(1, 2, h * w), shape=(h, w))
            for h, w in (query_shape, key_shape)
        )
        views = torch.tensor([[query_view, key_view]]).float()
        match = GeometricMatch()(query, key, views)
        return match.index[0].tolist(), match.valid[0].tolist()

    @pytest.mark.parametrize('key, shapes, index, valid', [
        ((0, 0, 20, 20, 1), {}, [1, 0, 3, 2], [True] * 4),
        # Only the lower right query cell is the key's upper left.
        ((10, 10, 20, 20, 0), {}, [..., ..., ..., 0], [False] * 3 + [True]),
        ((500, 0, 20, 20, 0), {}, [...] * 4, [False] * 4),
        # Centres at x = 3.3, 10, 16.7, y = 10: mirrored in the key's
        # crop, 1 pixel further, in columns 5, 3, 1 of 6 and row 0 of 2.
        ((1, 1, 20, 20, 1), dict(query_shape=(1, 3), key_shape=(2, 6)),
         [5, 3, 1], [True] * 3),
    ])  # fmt: skip
    def test_where_the_key_shows_it(self, key, shapes, index, valid):
        found = self.match((0, 0, 20, 20, 0), key, **shapes)
        assert found[1] == valid
        for one, expected in zip(found[0], index, strict=True):
            assert one == expected or (expected is ... and 0 <= one < 4)

    def test_exception(self):
        x = features(torch.zeros(1, 2, 4), shape=(2, 2))
        with pytest.raises(
            ValueError,
            match='GeometricMatch needs the crop coordinates of both '
            'views.*mmdensecl.TwoViews and mmdensecl.PackViews',
        ):
            GeometricMatch()(x, x, None)
