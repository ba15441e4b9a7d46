# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.

import pytest
import torch

from mmdensecl.models import Features, Match
from mmdensecl.models.losses import InfoNCEResult
from mmdensecl.models.metrics import (
    category_metrics,
    contrast_metrics,
    feature_std,
    match_metrics,
    position_r2,
)

SHOWS_SAME = [[0, 0, 40, 40, 0], [0, 0, 40, 40, 0]]


def grid_features(n, height, width):
    grid = torch.zeros(n, 2, height * width)
    return Features(grid[:, :, 0], grid, grid[:, :, 0], None, (height, width))


def monitor(index, views=None, valid=None, shape=(4, 4), key_shape=None):
    index = torch.tensor(index)
    monitors = match_metrics(
        Match(index, None if valid is None else torch.tensor(valid)),
        grid_features(len(index), *shape),
        grid_features(len(index), *(key_shape or shape)),
        None if views is None else torch.tensor(views).float(),
    )
    return {name: x.item() for name, x in monitors.items()}


class TestContrastMonitors:
    RESULT = InfoNCEResult(
        loss=torch.zeros(4),
        positive=torch.tensor([0.5, 0.1, 0.9, -1.0]),
        hardest_negative=torch.tensor([0.3, 0.4, 0.9, 0.0]),
    )

    def test_all_rows(self):
        monitors = contrast_metrics(self.RESULT)
        assert set(monitors) == {'pos_sim', 'neg_sim', 'acc'}
        assert monitors['pos_sim'] == pytest.approx(0.125)
        assert monitors['neg_sim'] == pytest.approx(0.4)
        # A tie, as in a collapsed model, is no success.
        assert monitors['acc'] == 25

    SEVERAL = InfoNCEResult(
        loss=torch.zeros(3, 2),
        positive=torch.tensor([[0.5, 0.1], [0.9, 0.7], [-1.0, 0.2]]),
        hardest_negative=torch.tensor([0.3, 0.8, 0.0]),
    )

    def test_several_positives(self):
        """Rows weigh the same, however many of theirs count."""
        monitors = contrast_metrics(self.SEVERAL)
        assert monitors['pos_sim'].item() == pytest.approx(1.4 / 6)
        assert monitors['neg_sim'].item() == pytest.approx(1.1 / 3)
        assert monitors['acc'] == 50
        valid = torch.tensor([[True, True], [False, True], [False, False]])
        monitors = contrast_metrics(self.SEVERAL, valid)
        assert monitors['pos_sim'].item() == pytest.approx((0.3 + 0.7) / 2)
        assert monitors['neg_sim'].item() == pytest.approx((0.3 + 0.8) / 2)
        assert monitors['acc'] == 25


class TestCategoryMonitors:
    def test_feature(self):
        """Half of the points in one of four, a quarter in two others."""
        labels = torch.tensor([0, 0, 3, 1, 0, 3, 0, 1])
        own = labels[:4]
        monitors = category_metrics(
            labels, own, torch.tensor([0, 1, 3, 2]), 4, None
        )
        assert monitors['category_used'] == 75
        # 1/2 of one bit and 2 * 1/4 of two bits; two bits at most.
        assert monitors['category_entropy'].item() == pytest.approx(75)
        assert monitors['category_agreement'] == 50


def test_feature_std():
    """0 where all are the same, 1 of random directions."""
    assert feature_std(torch.tensor([[0.6, 0.8]] * 5)) < 1e-6
    vectors = torch.nn.functional.normalize(torch.randn(4000, 32))
    assert feature_std(vectors) == pytest.approx(1, abs=0.02)


GRID = list(range(16))
MIRRORED = [4 * (i // 4) + 3 - i % 4 for i in GRID]
FLIP = [[0, 0, 40, 40, 1], [0, 0, 40, 40, 0]]
FAR = [[0, 0, 40, 40, 0], [400, 0, 40, 40, 0]]
# The key shows the right half; its cells are half as wide.
HALF = [[0, 0, 40, 40, 0], [20, 0, 20, 40, 0]]


class TestMatchMetrics:
    @pytest.mark.parametrize(
        'index, views, acc',
        [
            (GRID, SHOWS_SAME, 100),
            (MIRRORED, FLIP, 100),
            # Columns 0 and 3 are three off; 1 and 2 are neighbours.
            (MIRRORED, SHOWS_SAME, 50),
            # All point at cell 5, one off for 0-2, 4-6 and 8-10.
            ([5] * 16, SHOWS_SAME, 100 * 9 / 16),
            # Cell 4 begins the next row: near 3 in number, not in place.
            ([0, 1, 2, 4, *GRID[4:]], SHOWS_SAME, 100 * 15 / 16),
            # Columns 2 and 3 of the query lie at 0.5 and 2.5 of the key.
            ([4 * i + j for i in range(4) for j in (0, 0, 0, 2)], HALF, 100),
            ([4 * i + j for i in range(4) for j in (0, 0, 2, 2)], HALF, 50),
            (GRID, FAR, 0),  # and not NaN
            # Of several neighbours the best counts.
            ([[i, 15 - i] for i in GRID], SHOWS_SAME, 100),
        ],
    )
    def test_acc(self, index, views, acc):
        assert monitor([index], [views])['match_acc'] == pytest.approx(acc)

    def test_coverage(self):
        # 3 of 4 cells in one image, 1 of 4 in the other.
        metrics = monitor([[0, 1, 1, 3], [2, 2, 2, 2]], shape=(2, 2))
        assert metrics == {'match_coverage': 50}
        # Four query cells can cover half of eight key cells at most.
        metrics = monitor([[0, 2, 4, 6]], shape=(2, 2), key_shape=(2, 4))
        assert metrics == {'match_coverage': 50}

    def test_counts_valid_picks(self):
        """Six of the nine near cells of 16 that point at cell 5 are left."""
        valid = [[True] * 8 + [False] * 8]
        metrics = monitor([[5] * 16], [SHOWS_SAME], valid)
        assert metrics['match_acc'] == 75
        assert metrics['match_coverage'] == 100 / 16


class TestPositionShare:
    @staticmethod
    def vectors(*shape):
        generator = torch.Generator().manual_seed(0)
        grid = torch.randn(*shape, generator=generator)
        return torch.nn.functional.normalize(grid, dim=1)

    @pytest.mark.parametrize(
        'shape, copies, expected',
        [
            ((1, 8, 9), (4, 1, 1), 100),  # the place alone
            ((4, 8, 1), (1, 1, 9), 0),  # the image alone
            # Neither, also where few images leave the means to chance.
            ((2, 64, 400), (1, 1, 1), 0),
            ((20, 64, 400), (1, 1, 1), 0),
            # Nobody can tell.
            ((1, 8, 9), (1, 1, 1), 0),
            ((4, 8, 1), (1, 1, 1), 0),
        ],
    )
    def test_by_construction(self, shape, copies, expected):
        grid = self.vectors(*shape).repeat(*copies)
        assert position_r2(grid) == pytest.approx(expected, abs=1)

    def test_half(self):
        """Half of the channels tell the place, the other half nothing."""
        place = self.vectors(1, 64, 400).expand(100, -1, -1)
        grid = torch.cat([place, self.vectors(100, 64, 400)], dim=1) / 2**0.5
        assert position_r2(grid) == pytest.approx(50, abs=1)
        assert position_r2(grid.half()) == pytest.approx(50, abs=1)
