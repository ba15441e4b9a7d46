# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch

from mmdensecl.models.features import features_of
from mmdensecl.visualization.matches import strongest_matches
from mmdensecl.visualization.similarity_maps import (similarity_maps,
                                                     spread_cells)
from mmdensecl.visualization.verdict import (Accuracy, judge, match_accuracy,
                                             measure, settle_statistics)
from mmdensecl.visualization.views import Pairs

SIDE, CELL = 8, 4


def shifted_pairs(count, seed=0):
    """Crops of noise whose cells are 4 x 4 pixels, 2 columns apart."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(
        0,
        256, (count, 3, SIDE * CELL, (SIDE + 2) * CELL),
        generator=generator,
        dtype=torch.uint8)
    side = float(SIDE * CELL)
    views = torch.tensor([[0., 0., side, side, 0.],
                          [2. * CELL, 0., side, side, 0.]])
    return Pairs(source[..., :SIDE * CELL], source[..., 2 * CELL:],
                 views.expand(count, -1, -1))


def pixels_of_cells(images):
    """Hand-made features: a cell's own pixels."""
    return torch.nn.functional.pixel_unshuffle(images.float() - 127.5, CELL)


def nothing(images):
    """Features that know nothing of the picture."""
    return torch.randn(len(images), 16, SIDE, SIDE)


def test_hand_made_features_match_a_shifted_picture():
    pairs = shifted_pairs(3)
    found = measure(pixels_of_cells, pairs)
    assert found.right.tolist() == [1, 1, 1]
    query, key = (features_of(pixels_of_cells(x)) for x in pairs[:2])
    matches = strongest_matches(
        query, key, 0, pairs.views, top=99, min_similarity=0.9)
    # The two columns that only the first view shows have no match.
    assert len(matches.similarity) == SIDE * (SIDE - 2)
    assert matches.right.all()
    assert torch.allclose(
        torch.tensor(matches.query[:, 0] - matches.key[:, 0]),
        torch.tensor(2 / SIDE))


def test_chance_is_what_random_features_get():
    found = measure(nothing, shifted_pairs(64))
    # At most 3 x 3 of 64 cells are near.
    assert 0.08 < found.chance.mean() < 9 / 64
    error = found.right.std() / 8
    assert (found.right - found.chance).mean().abs() < 4 * error


def test_views_that_do_not_overlap_say_nothing():
    pairs = shifted_pairs(2)
    views = pairs.views.clone()
    views[0, 1, 0] = 1000
    query, key = (features_of(pixels_of_cells(x)) for x in pairs[:2])
    right = match_accuracy(query, key, views).right
    assert right.isnan().tolist() == [True, False]
    assert right[1] == 1


def spread(mean, count=16):
    return mean + torch.linspace(-0.1, 0.1, count)


@pytest.mark.parametrize('right, random, count, words', [
    (0.6, 0.2, 16, 'match object parts: clearly'),
    (0.6, 0.6, 16, 'do not match object parts better than'),
    (0.1, 0.1, 16, 'right no more often than chance'),
    (0.6, 0.2, 7, 'cannot be said: only 7'),
])
def test_verdict(right, random, count, words):
    generator = torch.Generator().manual_seed(0)
    chance = torch.full((count, ), 0.1)
    noise = 0.05 * torch.randn(count, generator=generator)
    verdict = judge(
        Accuracy(spread(right, count), chance),
        Accuracy(spread(random, count) + noise, chance))
    assert words in verdict.sentence()
    assert verdict.matches_parts == (
        right == 0.6 and random == 0.2 and count == 16)
    assert verdict.right == pytest.approx(right)
    assert verdict.pairs == count


def test_random_weights_get_statistics():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    images = 50 + 10 * torch.randn(40, 3, 8, 8)
    settle_statistics(network, images)
    out = network(images)
    assert not any(x.training for x in network.modules())
    assert network[1].momentum == 0.1
    assert out.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (out.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_similarity_maps_peak_where_the_cell_went():
    pairs = shifted_pairs(1)
    query, key = (features_of(pixels_of_cells(x)) for x in pairs[:2])
    maps = similarity_maps(query, key, [(3, 5), (0, 2)])
    assert maps.shape == (2, SIDE, SIDE)
    assert [divmod(int(x.argmax()), SIDE) for x in maps] == [(3, 3), (0, 0)]


def test_spread_cells():
    assert spread_cells((6, 4), 2) == [(1, 1), (1, 3), (4, 1), (4, 3)]
    assert len(spread_cells((3, 2), 9)) == 6
    assert spread_cells((6, 4), 0) == []
