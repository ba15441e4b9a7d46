# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Categories are compared with loops written from the papers' equations."""

import math

import pytest
import torch

from mmdensecl.models import (
    assign_clusters,
    kmeans_plusplus,
    kmeans_step,
    sinkhorn,
    spherical_kmeans,
    sup_con,
)
from mmdensecl.models.modules import l2_normalize


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_points(*shape):
    return l2_normalize(torch.randn(*shape, dtype=torch.float64))


def clustered_points(clusters=6, each=20, dim=8, spread=0.05):
    """Points around orthogonal directions, shuffled, and their labels."""
    labels = torch.arange(clusters).repeat_interleave(each)
    labels = labels[torch.randperm(len(labels))]
    noise = spread * torch.randn(len(labels), dim)
    return l2_normalize(torch.eye(dim)[labels] + noise), labels


def same_partition(a, b):
    """Equal up to the names of the labels."""
    return torch.equal(a[:, None] == a, b[:, None] == b)


class TestSphericalKMeans:
    @pytest.mark.parametrize('seed', range(2))
    @pytest.mark.parametrize('clusters', [2, 6, 8])
    def test_known_clusters_are_found(self, seed, clusters):
        points, labels = clustered_points(clusters)
        assert not same_partition(labels, labels.roll(1))  # the test can fail
        centers = spherical_kmeans(points, clusters, 10, generator(seed))
        assert same_partition(assign_clusters(points, centers), labels)
        for label in range(clusters):
            mean = points[labels == label].mean(dim=0)
            cosine = centers @ (mean / mean.norm())
            assert cosine.max().item() == pytest.approx(1, abs=1e-6)


class TestMoveCenters:
    def test_against_loops(self):
        points, centers = random_points(40, 3), random_points(4, 3)
        sums = [torch.zeros(3).double() for _ in centers]
        for point in points:
            cosines = [float(point @ center) for center in centers]
            sums[cosines.index(max(cosines))] += point
        expected = torch.stack([x / x.norm() for x in sums])
        torch.testing.assert_close(kmeans_step(points, centers), expected)

    def test_empty_clusters_go_to_the_worst_represented(self):
        """Two of four centres have no point; 70 and 30 degrees are worst."""
        angle = torch.deg2rad(torch.tensor([0.0, 2.0, 70.0, 4.0, 30.0]))
        points = torch.stack([angle.cos(), angle.sin()], dim=1)
        centers = torch.tensor(
            [[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [-0.6, -0.8]]
        )
        # All are nearest to the second, which moves to their sum.
        moved = kmeans_step(points, centers)
        mean = points.sum(dim=0)
        torch.testing.assert_close(moved[1], mean / mean.norm())
        torch.testing.assert_close(moved[[0, 2, 3]], points[[2, 4, 3]])


class TestSpreadPoints:
    def test_chances_are_those_of_squared_distances(self):
        """After a, at 60 degrees has weight 1 / 2 and at 180 weight 2."""
        angle = torch.deg2rad(torch.tensor([0.0, 60.0, 180.0]))
        points = torch.stack([angle.cos(), angle.sin()], dim=1)
        source, firsts, seconds = generator(), [0] * 3, {}
        for _ in range(3000):
            picked = kmeans_plusplus(points, 2, source)
            one, two = assign_clusters(picked, points).tolist()
            firsts[one] += 1
            seconds.setdefault(one, []).append(two)
        assert min(firsts) > 1000 - 4 * 26 and max(firsts) < 1000 + 4 * 26
        share = seconds[0].count(2) / len(seconds[0])
        assert share == pytest.approx(2 / 2.5, abs=4 * 0.013)
        # 1 - cos 60 = 1/2 and 1 - cos 120 = 3/2.
        share = seconds[1].count(2) / len(seconds[1])
        assert share == pytest.approx(1.5 / 2, abs=4 * 0.014)


class TestSinkhorn:
    @pytest.mark.parametrize('num_iters', [1, 3])
    def test_against_loops(self, num_iters):
        scores = torch.randn(7, 4, dtype=torch.float64)
        q = [[math.exp(x) for x in row] for row in scores.tolist()]
        for _ in range(num_iters):
            for k in range(4):
                total = sum(row[k] for row in q)
                for row in q:
                    row[k] /= 4 * total
            for row in q:
                total = sum(row)
                for k in range(4):
                    row[k] /= 7 * total
        expected = 7 * torch.tensor(q, dtype=torch.float64)
        torch.testing.assert_close(sinkhorn(scores, num_iters), expected)

    def test_large_scores(self):
        """exp(400) is no float32 number; similarity 1 over 1 / 400 is."""
        scores = 400 * torch.eye(5)
        torch.testing.assert_close(sinkhorn(scores, 3), torch.eye(5))


class TestSupCon:
    @pytest.mark.parametrize('temperature', [0.1, 1.0])
    def test_against_loops(self, temperature):
        query, points = random_points(4, 3), random_points(9, 3)
        query_labels = torch.tensor([0, 2, 2, 1])
        labels = torch.tensor([2, 0, 0, 1, 3, 2, 0, 3, 2])
        expected = []
        for q, label in zip(query, query_labels, strict=True):
            e = [math.exp(float(q @ p) / temperature) for p in points]
            own = [i for i in range(9) if labels[i] == label]
            expected.append(
                -sum(math.log(e[i] / sum(e)) for i in own) / len(own)
            )
        loss = sup_con(query, points, query_labels, labels, temperature)
        torch.testing.assert_close(loss, torch.tensor(expected).double())

    def test_gradcheck(self):
        points, labels = random_points(7, 3), torch.tensor([0, 1, 1, 0, 2, 2])
        labels = torch.cat([labels, labels[:1]])

        def loss(query):
            return sup_con(query, points, torch.tensor([1, 0, 2]), labels, 0.2)

        query = random_points(3, 3).requires_grad_()
        assert torch.autograd.gradcheck(loss, query)
