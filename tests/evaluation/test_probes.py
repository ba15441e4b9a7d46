# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdensecl.evaluation.probes import (
    average_precision,
    knn_accuracy,
    low_shot_map,
    nearest,
    svm_map,
)

FEW_COSTS = (0.1, 10.0)


def loop_knn(train, labels, test, k, temperature, classes):
    """Votes of the paper's equation, image by image."""
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    for row, query in zip(votes, test, strict=False):
        similar = []
        for image, label in zip(train, labels, strict=False):
            cosine = float(query @ image / query.norm() / image.norm())
            similar.append((cosine, int(label)))
        for cosine, label in sorted(similar, reverse=True)[:k]:
            row[label] += math.exp(cosine / temperature)
    return votes


class TestKNN:
    @pytest.mark.parametrize('block', [3, 8, 1000])
    def test_nearest_in_blocks(self, block):
        bank, queries = torch.randn(20, 4), torch.randn(7, 4)
        similarity, index = nearest(bank, queries, 6, block=block)
        cosines = F.cosine_similarity(queries[:, None], bank[None], dim=2)
        expected = cosines.sort(descending=True)
        torch.testing.assert_close(similarity, expected.values[:, :6])
        assert torch.equal(index, expected.indices[:, :6])

    def test_against_the_loop(self):
        train = torch.randn(60, 5, dtype=torch.float64) * 7
        test = torch.randn(40, 5, dtype=torch.float64)
        labels, targets = torch.randint(6, (60,)), torch.randint(6, (40,))
        found = knn_accuracy(
            train, labels, test, targets, ks=(1, 5, 30), topk=(1, 3)
        )
        for k, accuracies in found.items():
            votes = loop_knn(train, labels, test, k, 0.07, 6)
            order = votes.argsort(dim=1, descending=True)
            for n, accuracy in zip((1, 3), accuracies, strict=False):
                right = [
                    label in row[:n] and votes[i, label] > 0
                    for i, (row, label) in enumerate(
                        zip(order.tolist(), targets.tolist(), strict=False)
                    )
                ]
                assert accuracy == pytest.approx(100 * np.mean(right))


def test_average_precision_by_hand():
    """Ranks 1, 3 and 4 of five are right.

    Precisions there are 1, 2/3, 3/4; at the recall of the second, the third
    gives 3/4.
    """
    labels = np.array([1, 0, 1, 1, 0])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    expected = (1 + 3 / 4 + 3 / 4) / 3
    assert average_precision(labels, scores) == pytest.approx(expected)


def multi_label(count, classes=3, seed=0, difficult=0.0, noise=0.0):
    """Features that are the labels, rotated, and their targets."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, classes)) < 0.4).astype(np.int64)
    features = targets + noise * rng.standard_normal(targets.shape)
    # A constant keeps the direction of the empty image.
    features = np.concatenate([features, np.ones((count, 1))], axis=1)
    targets[rng.random(targets.shape) < difficult] = -1
    return features.astype(np.float32), targets


@pytest.mark.parametrize('split', ['training', 'test'])
def test_too_few_images(split):
    train, test = multi_label(30), multi_label(30, seed=1)
    (train if split == 'training' else test)[1][:, 2] = 0
    with pytest.raises(ValueError, match=f'Class 2 has . {split}'):
        svm_map(*train, *test, costs=FEW_COSTS)
    with pytest.raises(ValueError, match='this protocol needs 96'):
        low_shot_map(*train, *test)
    features, labels = torch.randn(8, 2), torch.zeros(8).long()
    with pytest.raises(ValueError, match='k=200 .* has 8 images'):
        knn_accuracy(features, labels, features, labels)


class TestSVM:
    def test_cost_is_chosen_by_cross_validation(self):
        """Separable features are scored 100; of two costs the good is taken.

        The scale of an image does not matter.
        """
        test = multi_label(40, seed=1)
        features, targets = multi_label(60)
        features *= np.random.default_rng(3).uniform(1, 900, (60, 1))
        found = svm_map(features, targets, *test, costs=FEW_COSTS)
        assert found == (100, [100] * 3)
        train = multi_label(60, noise=0.7)
        test = multi_label(200, seed=1, noise=0.7)
        tiny, good = 1e-9, 10.0
        both = svm_map(*train, *test, costs=(tiny, good))[0]
        single = [svm_map(*train, *test, costs=(x,))[0] for x in (tiny, good)]
        assert single[0] < single[1] == pytest.approx(both, abs=2)

    def test_difficult_ones_are_not_tested(self):
        """Worst possible scores at difficult images change nothing."""
        train = multi_label(60)
        features, targets = multi_label(40, seed=1)
        wrong = np.where(np.eye(4)[1] > 0, 1.0, 0.0)[None]  # shows class 1
        features = np.concatenate([features, np.repeat(wrong, 9, axis=0)])
        absent = np.array([[0, 0, 0]] * 9)
        found = [
            svm_map(
                *train,
                features,
                np.concatenate([targets, labels]),
                costs=FEW_COSTS,
            )[1]
            for labels in (absent, np.where(np.eye(3)[1] > 0, -1, absent))
        ]
        assert found[0][1] < 100 and found[1] == [100] * 3

    def test_difficult_ones_are_negatives_in_training(self):
        features, targets = multi_label(90, difficult=0.2)
        test = multi_label(80, seed=1, noise=0.8)
        as_negatives = np.where(targets == -1, 0, targets)
        assert svm_map(features, targets, *test, costs=FEW_COSTS) == svm_map(
            features, as_negatives, *test, costs=FEW_COSTS
        )


class TestLowShot:
    def test_what_a_sample_holds(self, monkeypatch):
        """k positives, k * (classes - 1) negatives, nothing difficult."""
        from mmdensecl.evaluation import probes

        seen = []

        def spy(train, test, targets, test_targets, costs, rows):
            seen.append(np.bincount(targets[rows] + 1, minlength=3).tolist())
            assert len(set(rows)) == len(rows)
            return [0.0, 1.0]

        monkeypatch.setattr(probes, '_sample_precisions', spy)
        found = low_shot_map(
            *multi_label(120, difficult=0.3),
            *multi_label(20, seed=1),
            shots=(1, 4),
            num_samples=2,
            costs=FEW_COSTS,
        )
        assert seen == [[0, 2, 1]] * 6 + [[0, 8, 4]] * 6
        assert found == {1: (100, 0), 4: (100, 0)}
