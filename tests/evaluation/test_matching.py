# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn.functional as F

from mmdensecl.evaluation.matching import (
    Accuracy,
    Pairs,
    compare,
    match_accuracy,
    mean_accuracy,
    measure,
)
from mmdensecl.models import BackboneSimilarity
from mmdensecl.models.metrics import match_metrics
from mmdensecl.models.modules import backbone_features
from mmdensecl.visualization import strongest_matches

SIDE, CELL = 8, 4


def shifted_pairs(count, seed=0):
    """Crops of noise whose cells are 4 x 4 pixels, 2 columns apart."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(
        0,
        256,
        (count, 3, SIDE * CELL, (SIDE + 2) * CELL),
        generator=generator,
        dtype=torch.uint8,
    )
    side = float(SIDE * CELL)
    views = torch.tensor(
        [[0.0, 0.0, side, side, 0.0], [2.0 * CELL, 0.0, side, side, 0.0]]
    )
    return Pairs(
        source[..., : SIDE * CELL],
        source[..., 2 * CELL :],
        views.expand(count, -1, -1),
    )


def pixels_of_cells(images):
    """Hand-made features: a cell's own pixels."""
    return F.pixel_unshuffle(images.float() - 127.5, CELL)


def nothing(images):
    """Features that know nothing of the image."""
    return torch.randn(len(images), 16, SIDE, SIDE)


class TestAccuracy:
    def test_hand_made_features_match_a_shifted_image(self):
        """More than a batch of them."""
        pairs = shifted_pairs(18)
        found = measure(pixels_of_cells, pairs)
        assert found.right.tolist() == [1] * 18
        assert found.same_position.tolist() == [0] * 18
        query, key = (backbone_features(pixels_of_cells(x)) for x in pairs[:2])
        matches = strongest_matches(
            query, key, 0, pairs.views, top=99, min_similarity=0.9
        )
        # The two columns that only the first view shows have no match.
        assert len(matches.similarity) == SIDE * (SIDE - 2)
        assert matches.right.all()
        assert torch.allclose(
            torch.tensor(matches.query[:, 0] - matches.key[:, 0]),
            torch.tensor(2 / SIDE),
        )

    def test_what_needs_no_features_by_counting(self):
        found = measure(nothing, shifted_pairs(1))
        # Of the 48 cells that both show none is less than two columns away.
        assert found.same_position.tolist() == [0]
        # Cells near the true spot, which a border cuts off.
        rows, columns = [2] + [3] * 6 + [2], [2] + [3] * 5
        near = sum(rows) * sum(columns)
        assert found.chance.item() == pytest.approx(near / 48 / 64)

    def test_views_that_do_not_overlap_say_nothing(self):
        pairs = shifted_pairs(2)
        views = pairs.views.clone()
        views[0, 1, 0] = 1000
        query, key = (backbone_features(pixels_of_cells(x)) for x in pairs[:2])
        for shares in match_accuracy(query, key, views):
            assert shares.isnan().tolist() == [True, False]

    def test_is_what_the_training_logs(self):
        """match_acc of DenseCL's rule, over cells instead of pairs."""
        pairs = shifted_pairs(4)
        noisy = pixels_of_cells(pairs.query) + 200 * torch.randn(4, 48, 8, 8)
        query, key = map(
            backbone_features, (noisy, pixels_of_cells(pairs.key))
        )
        found = match_accuracy(query, key, pairs.views)
        logged = match_metrics(
            BackboneSimilarity()(query, key, None),
            query,
            key._replace(dense_proj=key.backbone_feats),
            pairs.views,
        )['match_acc']
        assert 5 < logged < 95
        assert logged == pytest.approx(100 * found.right.mean().item())


def spread(mean, count=16):
    return mean + torch.linspace(-0.1, 0.1, count)


@pytest.mark.parametrize(
    'right, random, position, count, words',
    [
        (0.6, 0.2, 0.3, 16, 'match object parts: clearly'),
        (0.6, 0.6, 0.3, 16, 'they are not told apart from random weights.'),
        (0.6, 0.2, 0.6, 16, 'not told apart from the same position.'),
        (0.4, 0.6, 0.4, 16, 'same position, and worse than random weights.'),
        (0.6, 0.2, 0.3, 7, 'cannot be said: only 7'),
    ],
)
def test_sentences(right, random, position, count, words):
    """Only a significant difference is called one."""
    rulers = torch.full((count,), position), torch.full((count,), 0.1)
    noise = 0.05 * torch.randn(count)
    found = compare(
        Accuracy(spread(right, count), *rulers),
        Accuracy(spread(random, count) + noise, *rulers),
    )
    assert words in found.sentence()
    assert found.matches_parts == ('clearly' in words)
    assert [found.right, *found.baselines.values()] == pytest.approx(
        [right, random + noise.mean().item(), position, 0.1]
    )
    assert found.pairs == count


def test_pairs_that_say_nothing_are_left_out():
    nan = float('nan')
    draws = [
        Accuracy(*torch.tensor([x, [0.0, 0.2], [0.1, 0.1]]))
        for x in ([0.2, nan], [0.4, 0.6])
    ]
    assert mean_accuracy(draws).right.tolist() == pytest.approx([0.3, 0.6])
    right = spread(0.6, 10)
    right[3] = nan
    rulers = torch.full((10,), 0.2), torch.full((10,), 0.1)
    found = compare(Accuracy(right, *rulers), Accuracy(right / 2, *rulers))
    assert found.pairs == 9 and found.matches_parts


def test_above_chance_but_not_significant():
    """A share of several times chance may be luck, and is called neither."""
    right = torch.zeros(8)
    right[:2] = torch.tensor([0.6, 0.65])
    rulers = torch.zeros(8), torch.full((8,), 0.024)
    found = compare(Accuracy(right, *rulers), Accuracy(right / 2, *rulers))
    assert 1 < found.errors['chance'] < 3
    assert 'not told apart from' in found.sentence()
    assert 'no more often' not in found.sentence()
