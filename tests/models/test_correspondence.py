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
    Match,
    MutualNearestNeighbor,
    NearestNeighbors,
    ProjectionSimilarity,
    RandomMatch,
)
from mmdensecl.models.correspondence import mutual_nearest_cells, nearest_cells
from mmdensecl.models.modules import gather_positions, l2_normalize


def one_hot(*channels, num=4):
    """One picture (1, num, P) whose cell p is one-hot at channels[p]."""
    return torch.eye(num)[list(channels)].t()[None]


def features(grid=None, cells=None, shape=None):
    some = grid if grid is not None else cells
    return Features(some[:, :, 0], grid, some[:, :, 0], cells, shape)


class TestNearestCells:
    def test_permutation(self):
        """Not symmetric, so that query and key cannot be swapped."""
        query, key = one_hot(0, 1, 2, 3), one_hot(1, 2, 3, 0)
        assert nearest_cells(query, key).tolist() == [[3, 0, 1, 2]]
        assert nearest_cells(key, query).tolist() == [[1, 2, 3, 0]]

    def test_many_to_one(self):
        """One-way: two query cells may have the same nearest."""
        query, key = one_hot(2, 2, 0), one_hot(0, 1, 2)
        assert nearest_cells(query, key).tolist() == [[2, 2, 0]]

    def test_integer_dot_products(self):
        query = torch.tensor([[[2.0, -1.0], [1.0, 3.0]]])  # (2, 1), (-1, 3)
        key = torch.tensor([[[3.0, 0.0, -4.0], [4.0, 5.0, 3.0]]]) / 5
        # Dots with (2, 1): 10, 5, -5; with (-1, 3): 9, 15, 13.
        assert nearest_cells(query, key).tolist() == [[0, 1]]


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


class TestMatch:
    def test_best(self):
        index = torch.tensor([[[3, 1], [0, 2]]])
        assert Match(index).best.index.tolist() == [[3, 0]]
        assert Match(index).best.valid is None
        valid = torch.tensor([[[False, True], [True, False]]])
        assert Match(index, valid).best.valid.tolist() == [[False, True]]
        one = Match(index[..., 0], valid[..., 0])
        assert one.best is one

    @pytest.mark.parametrize('shape', [(2, 5), (2, 5, 3)])
    def test_gather_cells(self, shape):
        grid, index = torch.randn(2, 4, 6), torch.randint(6, shape)
        rows = gather_positions(grid, index)
        assert rows.shape == (10, *shape[2:], 4)
        rows = rows.view(2, 5, -1, 4)
        for n in range(2):
            for p in range(5):
                for j, cell in enumerate(index[n, p].view(-1)):
                    assert torch.equal(rows[n, p, j], grid[n, :, cell])


class TestRules:
    """Cells and projections disagree, so each rule shows what it reads."""

    def setup_method(self):
        self.query = features(one_hot(0, 1, 2), one_hot(0, 1, 2), shape=(1, 3))
        self.key = features(one_hot(2, 0, 1), one_hot(1, 2, 0), shape=(1, 3))

    def test_backbone_similarity(self):
        match = BackboneSimilarity()(self.query, self.key, None)
        assert match.index.tolist() == [[2, 0, 1]]
        assert match.valid is None

    def test_projection_similarity(self):
        match = ProjectionSimilarity()(self.query, self.key, None)
        assert match.index.tolist() == [[1, 2, 0]]
        assert match.valid is None

    def test_mutual_nearest_neighbor(self):
        match = MutualNearestNeighbor()(self.query, self.key, None)
        assert match.index.tolist() == [[2, 0, 1]]
        assert match.valid.tolist() == [[True] * 3]

    def test_nearest_neighbors(self):
        """The k largest cosines, largest first; one is nearest_cells."""
        cells = l2_normalize(torch.randn(3, 5, 7))
        query = features(cells=cells, shape=(1, 7))
        other = l2_normalize(torch.randn(3, 5, 4))
        key = features(cells=other, shape=(1, 4))
        for k in (2, 4):
            match = NearestNeighbors(k)(query, key, None)
            assert match.index.shape == (3, 7, k) and match.valid is None
            for n in range(3):
                for i in range(7):
                    cosine = [float(cells[n, :, i] @ x) for x in other[n].t()]
                    best = sorted(range(4), key=lambda j: -cosine[j])[:k]
                    assert match.index[n, i].tolist() == best
        one = NearestNeighbors(1)(query, key, None)
        assert torch.equal(one.index, nearest_cells(cells, other))

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

    @pytest.mark.parametrize(
        'rule, reads',
        [
            (BackboneSimilarity, True),
            (partial(NearestNeighbors, k=1), True),
            (ProjectionSimilarity, False),
            (MutualNearestNeighbor, True),
            (RandomMatch, False),
            (GeometricMatch, False),
        ],
    )
    def test_reads_backbone(self, rule, reads):
        """What a rule does not ask for may be missing."""
        assert rule().reads_backbone is reads
        query, key = self.query, self.key
        if not reads:
            query, key = (
                x._replace(backbone_feats=None) for x in (query, key)
            )
        views = torch.tensor([[[0.0, 0, 3, 1, 0]] * 2])
        assert rule()(query, key, views).index.shape == (1, 3)


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
    def test_a_crowded_key_is_shared_out(self):
        """All queries like key 0 best; by balance only one may take it."""
        key = torch.eye(3)[None]
        query = l2_normalize(
            torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.9, 0.0], [0.0, 0.0, 0.9]]])
        )
        crowded = BackboneSimilarity()(
            features(cells=query), features(cells=key), None
        )
        assert crowded.index.tolist() == [[0, 0, 0]]
        match = BalancedSimilarity(epsilon=0.1)(
            features(cells=query), features(cells=key), None
        )
        assert match.index.tolist() == [[0, 1, 2]]

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

    def test_mirrored(self):
        for flips in ((0, 1), (1, 0)):
            index, valid = self.match(
                (0, 0, 20, 20, flips[0]), (0, 0, 20, 20, flips[1])
            )
            assert index == [1, 0, 3, 2]
            assert all(valid)

    def test_shifted(self):
        """Only the lower right query cell is the key's upper left."""
        index, valid = self.match((0, 0, 20, 20, 0), (10, 10, 20, 20, 0))
        assert valid == [False, False, False, True]
        assert index[3] == 0

    def test_grids_that_are_not_square(self):
        """A 1 x 3 grid in a 2 x 6 one, mirrored, slightly shifted."""
        index, valid = self.match(
            (0, 0, 90, 40, 0), (1, 1, 90, 40, 1), (1, 3), (2, 6)
        )
        # Centres at x = 15, 45, 75, y = 20: mirrored in the key's crop at
        # 76, 46 and 16 of 90 pixels, in columns 5, 3, 1; row 19 of 40, 0.
        assert index == [5, 3, 1]
        assert all(valid)

    def test_no_overlap(self):
        index, valid = self.match((0, 0, 20, 20, 0), (500, 0, 20, 20, 0))
        assert not any(valid)
        assert all(0 <= i < 4 for i in index)

    def test_exception(self):
        x = features(torch.zeros(1, 2, 4), shape=(2, 2))
        with pytest.raises(
            ValueError,
            match='GeometricMatch needs the crop coordinates of both '
            'views.*mmdensecl.TwoViews and mmdensecl.PackViews',
        ):
            GeometricMatch()(x, x, None)
