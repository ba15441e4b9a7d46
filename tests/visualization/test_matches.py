# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import matplotlib
import numpy as np
import torch

from mmdensecl.models.modules import Features, backbone_features
from mmdensecl.visualization import draw_matches, legend, strongest_matches
from mmdensecl.visualization.similarity_maps import (
    similarity_maps,
)

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def features(order):
    """Cells of a 2 x 2 grid with orthogonal features, in that order."""
    cells = torch.eye(4)[:, order][None]
    return Features(
        torch.ones(1, 1),
        dense_proj=torch.ones(1, 1, 4),
        backbone_feats=cells,
        shape=(2, 2),
    )


WHOLE = [0.0, 0.0, 10.0, 10.0, 0.0]
MIRRORED = [0.0, 0.0, 10.0, 10.0, 1.0]
ELSEWHERE = [50.0, 50.0, 10.0, 10.0, 0.0]


def test_a_mirrored_view():
    """Columns swap, so that cells 0, 1, 2, 3 are found as 1, 0, 3, 2."""
    views = torch.tensor([[WHOLE, MIRRORED]])
    matches = strongest_matches(
        features([0, 1, 2, 3]), features([1, 0, 3, 2]), 0, views
    )
    assert len(matches.similarity) == 4 and matches.right.all()
    np.testing.assert_allclose(matches.key[:, 0], 1 - matches.query[:, 0])
    np.testing.assert_allclose(matches.key[:, 1], matches.query[:, 1])


def test_strongest_first_and_only_mutual():
    query = torch.zeros(1, 2, 4)
    query[0, :, 0] = torch.tensor([1.0, 0.0])
    query[0, :, 1] = torch.tensor([0.6, 0.8])
    query[0, :, 2] = torch.tensor([0.8, 0.6])  # prefers 0, which prefers 0
    query[0, :, 3] = torch.tensor([-1.0, 0.0])
    key = torch.zeros(1, 2, 2)
    key[0, :, 0] = torch.tensor([1.0, 0.0])
    key[0, :, 1] = torch.tensor([0.0, 1.0])
    q = Features(torch.ones(1, 1), backbone_feats=query, shape=(2, 2))
    k = Features(torch.ones(1, 1), backbone_feats=key, shape=(1, 2))
    matches = strongest_matches(q, k, 0)
    np.testing.assert_allclose(matches.similarity, [1.0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(matches.query, [[0.25, 0.25], [0.75, 0.25]])
    np.testing.assert_allclose(matches.key, [[0.25, 0.5], [0.75, 0.5]])
    assert matches.right is None
    assert len(strongest_matches(q, k, 0, top=1).similarity) == 1


def test_lines_end_at_the_cells():
    one = features([0, 1, 2, 3])
    views = torch.tensor([[WHOLE, ELSEWHERE]])
    figure, ax = plt.subplots()
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    draw_matches(ax, image, image, strongest_matches(one, one, 0, views))
    legend(figure)
    assert len(ax.lines) == 4
    for line in ax.lines:
        (x0, x1), (y0, y1) = line.get_data()
        assert x1 - x0 == 32 + 2 and y0 == y1  # views 2 pixels apart
        assert line.get_color() == 'tab:red'
    plt.close(figure)


def test_similarity_maps_peak_where_the_cell_went():
    """A grid of 4 x 4 orthogonal cells, the key's one column further."""
    cells = torch.eye(16).view(1, 16, 4, 4)
    query, key = (
        backbone_features(cells),
        backbone_features(cells.roll(-1, dims=3)),
    )
    maps = similarity_maps(query, key, [(3, 2), (0, 1)])
    assert maps.shape == (2, 4, 4)
    assert [divmod(int(x.argmax()), 4) for x in maps] == [(3, 1), (0, 0)]
