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
from mmdensecl.models.correspondence import (
    mutual_nearest_cells,
    nearest_cells,
    neighbor_cells,
)
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

    def test_grids_of_different_size(self):
        query, key = one_hot(3, 1, 0, 1, 2), one_hot(3, 2, 1)
        picks = nearest_cells(query, key)
        assert picks.shape == (1, 5)
        assert picks[0, [0, 1, 3, 4]].tolist() == [0, 2, 2, 1]

    def test_integer_dot_products(self):
        query = torch.tensor([[[2.0, -1.0], [1.0, 3.0]]])  # (2, 1), (-1, 3)
        key = torch.tensor([[[3.0, 0.0, -4.0], [4.0, 5.0, 3.0]]]) / 5
        # Dots with (2, 1): 10, 5, -5; with (-1, 3): 9, 15, 13.
        assert nearest_cells(query, key).tolist() == [[0, 1]]

    def test_samples_are_apart(self):
        query = torch.cat([one_hot(0, 1), one_hot(0, 1)])
        key = torch.cat([one_hot(0, 1), one_hot(1, 0)])
        assert nearest_cells(query, key).tolist() == [[0, 1], [1, 0]]

    def test_any_two_channel_dims(self):
        """Rows of channels, not of cells, are compared."""
        query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
        key = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]])
        assert nearest_cells(query, key).tolist() == [[1, 0]]


class TestMutualNearestCells:
    def test_feature(self):
        # Cosines of query angles 0, 30, 90 with key angles 40, 80, 200.
        def at(*degrees):
            angle = torch.deg2rad(torch.tensor(degrees).float())
            return torch.stack([angle.cos(), angle.sin()])[None]

        match = mutual_nearest_cells(at(0, 30, 90), at(40, 80, 200))
        assert match.index.tolist() == [[0, 0, 1]]
        # Key 0 is nearest to query 1, not to query 0.
        assert match.valid.tolist() == [[False, True, True]]

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


class TestNeighborCells:
    @pytest.mark.parametrize('k', [1, 2, 3, 4])
    @pytest.mark.parametrize('mutual', [False, True])
    @pytest.mark.parametrize('min_similarity', [None, 0.3])
    def test_against_loops(self, k, mutual, min_similarity):
        query = l2_normalize(torch.randn(3, 5, 7))
        key = l2_normalize(torch.randn(3, 5, 4))
        match = neighbor_cells(query, key, k, mutual, min_similarity)
        index, valid = match
        assert index.shape == ((3, 7) if k == 1 else (3, 7, k))
        assert (valid is None) == (not mutual and min_similarity is None)
        index = index.view(3, 7, k)
        counted = []
        for n in range(3):
            cosine = [
                [float(query[n, :, i] @ key[n, :, j]) for j in range(4)]
                for i in range(7)
            ]
            for i in range(7):
                best = sorted(range(4), key=lambda j: -cosine[i][j])[:k]
                assert index[n, i].tolist() == best
                for place, j in enumerate(best):
                    back = sorted(range(7), key=lambda i: -cosine[i][j])[:k]
                    counts = not mutual or i in back
                    if min_similarity is not None:
                        counts &= cosine[i][j] >= min_similarity
                    counted.append(counts)
                    if valid is not None:
                        got = valid.view(3, 7, k)[n, i, place]
                        assert got == counts
        assert all(counted) == (valid is None)
        assert any(counted)

    def test_one_is_nearest_cells(self):
        """Also of equal cells, where the first wins."""
        query = torch.cat([torch.randn(1, 5, 6), torch.ones(1, 5, 6)])
        query = l2_normalize(query)
        key = l2_normalize(query + torch.randn(2, 5, 1))
        match = neighbor_cells(query, key, 1)
        assert torch.equal(match.index, nearest_cells(query, key))
        assert match.valid is None

    def test_more_than_the_query_has_cells(self):
        """Each key cell then has every query cell among its nearest."""
        match = neighbor_cells(one_hot(0, 1), one_hot(0, 1, 2), 3, mutual=True)
        assert match.valid.all()


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
        """Of cells at 0, 50 and 90 degrees, seen from 10 and 80."""

        def at(*degrees):
            angle = torch.deg2rad(torch.tensor(degrees).float())
            return torch.stack([angle.cos(), angle.sin()])[None]

        query = features(cells=at(10, 80), shape=(1, 2))
        key = features(cells=at(0, 50, 90), shape=(1, 3))
        match = NearestNeighbors(k=2)(query, key, None)
        assert match.index.tolist() == [[[0, 1], [2, 1]]]
        assert match.valid is None
        match = NearestNeighbors(k=2, min_similarity=0.8)(query, key, None)
        assert match.valid.tolist() == [[[True, False], [True, True]]]
        match = NearestNeighbors(k=1, mutual=True)(query, key, None)
        assert match.index.tolist() == [[0, 2]]
        assert NearestNeighbors().k == 4

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

    def test_none_by_default(self):
        cells = l2_normalize(torch.rand(2, 3, 4))
        match = BackboneSimilarity()(
            features(cells=cells), features(cells=cells), None
        )
        assert match.weight is None and match.valid is None

    def test_exception(self):
        with pytest.raises(ValueError, match='at least 0, got -1'):
            BackboneSimilarity(weight_power=-1)


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

    @pytest.mark.parametrize('kwargs', [dict(epsilon=0.0), dict(num_iters=0)])
    def test_exception(self, kwargs):
        with pytest.raises(ValueError, match='epsilon must be above 0'):
            BalancedSimilarity(**kwargs)


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

    def test_same_crop(self):
        index, valid = self.match((0, 0, 20, 20, 0), (0, 0, 20, 20, 0))
        assert index == [0, 1, 2, 3]
        assert all(valid)

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

    def test_shifted_and_mirrored(self):
        index, valid = self.match((0, 0, 20, 20, 1), (10, 10, 20, 20, 0))
        assert valid == [False, False, True, False]
        assert index[2] == 0

    def test_grids_that_are_not_square(self):
        """A 1 x 3 grid in a 2 x 6 one, mirrored, slightly shifted."""
        index, valid = self.match(
            (0, 0, 90, 40, 0), (1, 1, 90, 40, 1), (1, 3), (2, 6)
        )
        # Centres at x = 15, 45, 75, y = 20: mirrored in the key's crop at
        # 76, 46 and 16 of 90 pixels, in columns 5, 3, 1; row 19 of 40, 0.
        assert index == [5, 3, 1]
        assert all(valid)

    def test_nearest_cell(self):
        """A point belongs to the cell that it lies in."""
        # One query cell with its centre at 12 of the key's 0..40.
        index, valid = self.match(
            (0, 0, 24, 24, 0), (0, 0, 40, 40, 0), (1, 1), (4, 4)
        )
        assert (index, valid) == ([5], [True])

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
