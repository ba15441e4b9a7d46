# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Spherical k-means and Sinkhorn-Knopp for L2-normalised features.

G points (G, D), K centres (K, D), all normalised. Deterministic and without
host-device synchronisation: ranks that hold the same points and generator find
the same categories.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def assign_clusters(points: Tensor, centers: Tensor) -> Tensor:
    """Most similar centre of each point, (G, ); of equal ones the first."""
    return (points @ centers.t()).argmax(dim=1)


def kmeans_plusplus(
    points: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Pick points that lie apart, as k-means++ does, (G, D) -> (count, D).

    Arthur and Vassilvitskii 2007: each is drawn with a probability in
    proportion to its squared distance to the nearest one picked so far, which
    is 2 - 2 cos on the sphere. Drawn as a race: the point wins whose waiting
    time, exponential at the rate of its weight, is the shortest. Where fewer
    than `count` points differ, some are picked again.
    """
    waiting = points.new_empty(count, len(points))
    waiting.exponential_(generator=generator)
    # An exponential may be rounded to 0, and a weight of 0 must never win.
    waiting.clamp_(min=torch.finfo(points.dtype).tiny)
    weight = points.new_full((len(points),), 2.0)  # 1 - cos at most
    picked = []
    for times in waiting:
        winner = (weight / times).argmax(dim=0, keepdim=True)
        picked.append(points.index_select(0, winner))
        distance = 1 - points @ picked[-1][0]
        weight = weight.minimum(distance.clamp(min=0))
    return torch.cat(picked)


def kmeans_step(points: Tensor, centers: Tensor) -> Tensor:
    """One iteration of spherical k-means: the next centres, (K, D).

    Dhillon and Modha 2001: a centre moves to the direction of the sum of the
    points that are nearest to it. Centres without a point go to the points
    that are represented worst, one each.
    """
    nearest = (points @ centers.t()).max(dim=1)
    names = torch.arange(len(centers), device=points.device)
    members = nearest.indices[:, None] == names  # (G, K)
    # A product, as adding up by index has no order on a GPU.
    moved = F.normalize(members.to(points).t() @ points, dim=1)
    worst = nearest.values.topk(len(centers), largest=False).indices
    empty = ~members.any(dim=0)
    turn = (empty.cumsum(dim=0) - 1).clamp(min=0)
    return torch.where(empty[:, None], points[worst[turn]], moved)


def spherical_kmeans(
    points: Tensor,
    num_clusters: int,
    num_iters: int,
    generator: torch.Generator,
) -> Tensor:
    """Centres of clusters by cosine similarity, (num_clusters, D).

    From a k-means++ start, which the generator decides; at least as many
    points as clusters.
    """
    centers = kmeans_plusplus(points, num_clusters, generator)
    for _ in range(num_iters):
        centers = kmeans_step(points, centers)
    return centers


def sinkhorn(scores: Tensor, num_iters: int) -> Tensor:
    """Assign points to categories so that all categories get as much.

    Sinkhorn-Knopp as in SwAV (Caron et al. 2020, section 3.1): columns and
    rows of exp(scores), (..., G, K), similarities over epsilon, are normalised
    in turn. In the log domain, where no score is too large. Rows sum to 1, and
    columns, the more the iterations the closer, to G / K.
    """
    for _ in range(num_iters):
        scores = scores - scores.logsumexp(dim=-2, keepdim=True)
        scores = scores - scores.logsumexp(dim=-1, keepdim=True)
    return scores.exp()
