# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch
from mmpretrain.structures import DataSample

from mmdensecl.models.correspondence import locate_positions, stack_views

SAME = (0, 0, 40, 40)


def locate(query, key, query_shape=(4, 4), key_shape=(4, 4)):
    """Columns, rows and inside of one pair as nested lists (H, W)."""
    there = locate_positions(
        torch.tensor([query]).float(),
        torch.tensor([key]).float(),
        query_shape,
        key_shape,
    )
    return [x.view(query_shape).tolist() for x in there]


class TestLocateCells:
    """All crops are such that the centres fall on whole cells."""

    @pytest.mark.parametrize('flips', [(1, 0), (0, 1)])
    def test_one_is_mirrored(self, flips):
        columns, rows, inside = locate((*SAME, flips[0]), (*SAME, flips[1]))
        assert columns == [[3, 2, 1, 0]] * 4
        assert rows == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
        assert inside == [[True] * 4] * 4

    def test_shifted(self):
        """The key's crop begins one cell right of and two below."""
        columns, rows, inside = locate(
            (10, 30, 40, 40, 0), (20, 50, 40, 40, 0)
        )
        assert columns == [[-1, 0, 1, 2]] * 4
        assert rows == [[-2] * 4, [-1] * 4, [0] * 4, [1] * 4]
        assert inside == [[False] * 4] * 2 + [[False, True, True, True]] * 2

    def test_shifted_and_key_mirrored(self):
        columns, _, inside = locate((10, 0, 40, 40, 0), (20, 0, 40, 40, 1))
        assert columns == [[4, 3, 2, 1]] * 4
        assert inside == [[False, True, True, True]] * 4

    def test_grids_that_are_not_square(self):
        """A 2 x 3 grid of cells of 20 x 30 pixels in one of 4 x 6."""
        columns, rows, inside = locate(
            (0, 0, 90, 40, 0), (0, 0, 90, 40, 0), (2, 3), (4, 6)
        )
        assert columns == [[0.5, 2.5, 4.5]] * 2
        assert rows == [[0.5] * 3, [2.5] * 3]
        assert inside == [[True] * 3] * 2

    def test_no_overlap(self):
        for key in (
            (40, 0, 40, 40, 0),
            (0, 40, 40, 40, 1),
            (-40, 0, 40, 40, 0),
            (0, -40, 40, 40, 1),
        ):
            assert locate((*SAME, 0), key)[2] == [[False] * 4] * 4

    def test_samples_are_apart(self):
        query = torch.tensor([[0.0, 0, 40, 40, 0], [0, 0, 40, 40, 0]])
        key = torch.tensor([[0.0, 0, 40, 40, 1], [400, 0, 40, 40, 0]])
        there = locate_positions(query, key, (1, 2), (1, 2))
        assert there.column.tolist() == [[1, 0], [-20, -19]]
        assert there.inside.tolist() == [[True, True], [False, False]]

    def test_mirrored_twice_is_the_way_back(self):
        """Random crops: to the key's grid and back is the identity."""
        torch.manual_seed(1)
        size = torch.rand(20, 2, 2) * 50 + 20
        view = torch.cat(
            [
                torch.rand(20, 2, 2) * 40,
                size,
                torch.randint(2, (20, 2, 1)).float(),
            ],
            dim=2,
        )
        there = locate_positions(view[:, 0], view[:, 1], (3, 5), (4, 7))
        for n, i in there.inside.nonzero().tolist():
            # A one-cell crop around the spot in the picture, by hand.
            left, top, w, h, flip = view[n, 1].tolist()
            u = (float(there.column[n, i]) + 0.5) / 7
            x = left + (1 - u if flip else u) * w
            y = top + (float(there.row[n, i]) + 0.5) / 4 * h
            left, top, w, h, flip = view[n, 0].tolist()
            u = (x - left) / w
            column = (1 - u if flip else u) * 5 - 0.5
            row = (y - top) / h * 3 - 0.5
            assert column == pytest.approx(i % 5, abs=1e-3)
            assert row == pytest.approx(i // 5, abs=1e-3)
        assert 0 < there.inside.float().mean() < 1


class TestStackViews:
    ROWS = [[1, 2, 3, 4, 0], [5, 6, 7, 8, 1]]

    def test_feature(self):
        sample = DataSample()
        sample.set_metainfo(dict(views=self.ROWS))
        views = stack_views([sample, sample], torch.device('cpu'))
        assert views.dtype == torch.float32
        assert views.tolist() == [self.ROWS] * 2

    def test_missing(self):
        sample = DataSample()
        sample.set_metainfo(dict(views=self.ROWS))
        device = torch.device('cpu')
        assert stack_views(None, device) is None
        assert stack_views([], device) is None
        assert stack_views([sample, DataSample()], device) is None
