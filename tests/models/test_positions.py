# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch

from mmdensecl.models.correspondence import locate_positions

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

    @pytest.mark.parametrize('query, key, shapes, columns, rows', [
        ((*SAME, 1), (*SAME, 0), (), [3, 2, 1, 0], [0, 1, 2, 3]),
        ((*SAME, 0), (*SAME, 1), (), [3, 2, 1, 0], [0, 1, 2, 3]),
        # The key's crop begins one cell right of and two below.
        ((10, 30, 40, 40, 0), (20, 50, 40, 40, 0), (), [-1, 0, 1, 2],
         [-2, -1, 0, 1]),
        # And is mirrored.
        ((10, 0, 40, 40, 0), (20, 0, 40, 40, 1), (), [4, 3, 2, 1],
         [0, 1, 2, 3]),
        # A 2 x 3 grid of cells of 20 x 30 pixels in one of 4 x 6.
        ((0, 0, 90, 40, 0), (0, 0, 90, 40, 0), ((2, 3), (4, 6)),
         [0.5, 2.5, 4.5], [0.5, 2.5]),
        # No overlap.
        ((*SAME, 0), (-40, 0, 40, 40, 0), (), [4, 5, 6, 7], [0, 1, 2, 3]),
        ((*SAME, 0), (0, 40, 40, 40, 0), (), [0, 1, 2, 3], [-4, -3, -2, -1]),
    ])  # fmt: skip
    def test_by_hand(self, query, key, shapes, columns, rows):
        found = locate(query, key, *shapes)
        height, width = shapes[1] if shapes else (4, 4)
        assert found[0] == [columns] * len(rows)
        assert found[1] == [[row] * len(columns) for row in rows]
        assert found[2] == [
            [0 <= x < width and 0 <= y < height for x in columns] for y in rows
        ]

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
