# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Heads that contrast cells across pictures by categories they discover.

Our interpretation of the paper (DSC, https://arxiv.org/abs/2109.07756), of
which the abstract alone was at hand. What it leaves open is an argument.
"""
from typing import Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import all_gather, get_rank
from mmengine.model import BaseModule
from torch import Tensor

from mmdensecl.registry import MODELS
from ..clustering import nearest_center, sinkhorn, spherical_kmeans
from ..losses import sup_con
from ..monitors import category_monitors
from ..row_means import mean_over_ranks


def _check(least: float, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f'{name} must be above 0, got {value}')


class CategoryHead(BaseModule):
    """What category heads share: the mini-batch of all ranks.

    A head says in :meth:`contrast` what the loss of an anchor is, and which
    category a point has: the nearest of the centres.
    """

    def loss(
        self,
        query_points: Tensor,
        key_points: Tensor,
        valid: Optional[Tensor],
        generator: torch.Generator,
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss over the anchors that have a partner, and what to log.

        In float32 at least, also under autocast.

        Args:
            query_points (Tensor): Anchors of this rank, normalised, (M, D).
            key_points (Tensor): The partner of each anchor in the other view,
                normalised, (M, D). No gradient flows into it.
            valid (Tensor, optional): Which anchors have a partner, bool,
                (M, ). None means all.
            generator (torch.Generator): In the same state on all ranks.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: The scalar loss of
            :func:`mmdensecl.models.row_means.mean_over_ranks` and the
            monitors of :func:`mmdensecl.models.monitors.category_monitors`.
        """
        with torch.autocast(query_points.device.type, enabled=False):
            if query_points.itemsize < 4:
                query_points = query_points.float()
            key_points = key_points.detach().to(query_points)
            points = torch.cat(all_gather(key_points.contiguous()))
            start = get_rank() * len(key_points)
            own = slice(start, start + len(key_points))
            losses, labels, centers = self.contrast(query_points, points, own,
                                                    generator)
            found = nearest_center(query_points.detach(), centers)
            monitors = category_monitors(labels, labels[own], found,
                                         len(centers), valid)
            return mean_over_ranks(losses, valid), monitors

    def contrast(self, query: Tensor, points: Tensor, own: slice,
                 generator: torch.Generator) -> Tuple[Tensor, Tensor, Tensor]:
        """The loss of each anchor.

        Args:
            query (Tensor): Anchors of this rank, (M, D), with gradient.
            points (Tensor): Key points of all ranks, (G, D).
            own (slice): Which of them are the partners of the anchors.
            generator (torch.Generator): In the same state on all ranks.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Losses, (M, ); the category of each
            point, (G, ); and the categories' centres, normalised and without
            gradient, (K, D).
        """
        raise NotImplementedError


@MODELS.register_module()
class KMeansCategoryHead(CategoryHead):
    """DSC-KM: k-means over the mini-batch, then supervised contrast.

    Our interpretation of the paper. The key points of all ranks are clustered
    anew in each step (spherical k-means, which is k-means by the similarity
    that the losses use). An anchor's label is the cluster of its partner, its
    positives are all key points of that cluster, from whichever picture.

    Args:
        num_clusters (int): Clusters of a mini-batch. Defaults to 64: of the
            order of the classes of COCO, and 64 points each at 256 pictures
            with 16 points.
        num_iters (int): Iterations of k-means. Defaults to 10: after a
            k-means++ start little moves later.
        temperature (float): Divides the similarities. Defaults to 0.2, as in
            the other two losses.
        init_cfg (dict | list[dict], optional): Initialisation. Defaults to
            None; the head has no parameters.

    Raises:
        ValueError: An argument is out of range, or there are fewer points
            than clusters.
    """

    def __init__(self,
                 num_clusters: int = 64,
                 num_iters: int = 10,
                 temperature: float = 0.2,
                 init_cfg: Optional[Union[dict, List[dict]]] = None) -> None:
        super().__init__(init_cfg)
        _check(2, num_clusters=num_clusters)
        _check(0, num_iters=num_iters)
        _check_positive(temperature=temperature)
        self.num_clusters = num_clusters
        self.num_iters = num_iters
        self.temperature = temperature

    def contrast(self, query: Tensor, points: Tensor, own: slice,
                 generator: torch.Generator) -> Tuple[Tensor, Tensor, Tensor]:
        """See :meth:`CategoryHead.contrast`."""
        if len(points) < self.num_clusters:
            raise ValueError(
                f'k-means cannot find num_clusters={self.num_clusters} '
                f'clusters among the {len(points)} points of a mini-batch '
                '(pictures of all ranks x num_samples). Lower '
                'category.num_clusters or raise num_samples or the batch.')
        centers = spherical_kmeans(points, self.num_clusters, self.num_iters,
                                   generator)
        labels = nearest_center(points, centers)
        losses = sup_con(query, points, labels[own], labels, self.temperature)
        return losses, labels, centers


@MODELS.register_module()
class PrototypeCategoryHead(CategoryHead):
    """DSC-PM: learnt prototypes with balanced assignment.

    Our interpretation of the paper. Prototypes are directions that live on
    from step to step. The key points of all ranks are assigned to them so
    that each prototype gets as much (Sinkhorn-Knopp, which is what keeps all
    from falling into one), and an anchor predicts the assignment of its
    partner (the swapped prediction of SwAV, https://arxiv.org/abs/2006.09882,
    one way, as the key encoder is not trained). The prototypes learn from that
    prediction.

    Args:
        num_prototypes (int): Categories of the data set. Defaults to 64, as
            many as DSC-KM has clusters.
        feat_dim (int): Channels of the dense projections. Defaults to 128,
            the model's own default.
        epsilon (float): How soft the assignment is. Defaults to 0.05, SwAV's.
        sinkhorn_iters (int): Iterations of Sinkhorn-Knopp. Defaults to 3,
            SwAV's.
        temperature (float): Divides the anchors' similarities. Defaults to
            0.1, SwAV's.
        init_cfg (dict | list[dict], optional): Initialisation. Defaults to
            None: random directions.

    Raises:
        ValueError: An argument is out of range, or ``feat_dim`` is not that
            of the points.
    """

    def __init__(self,
                 num_prototypes: int = 64,
                 feat_dim: int = 128,
                 epsilon: float = 0.05,
                 sinkhorn_iters: int = 3,
                 temperature: float = 0.1,
                 init_cfg: Optional[Union[dict, List[dict]]] = None) -> None:
        super().__init__(init_cfg)
        _check(2, num_prototypes=num_prototypes)
        _check(1, feat_dim=feat_dim, sinkhorn_iters=sinkhorn_iters)
        _check_positive(epsilon=epsilon, temperature=temperature)
        self.epsilon = epsilon
        self.sinkhorn_iters = sinkhorn_iters
        self.temperature = temperature
        # Not from the generator that the encoders are drawn from: the same
        # seed gives the weights of a DenseCL.
        own = torch.Generator().manual_seed(torch.initial_seed())
        directions = torch.randn(num_prototypes, feat_dim, generator=own)
        self.prototypes = nn.Parameter(F.normalize(directions, dim=1))

    def contrast(self, query: Tensor, points: Tensor, own: slice,
                 generator: torch.Generator) -> Tuple[Tensor, Tensor, Tensor]:
        """See :meth:`CategoryHead.contrast`."""
        feat_dim = self.prototypes.size(1)
        if points.size(1) != feat_dim:
            raise ValueError(
                f'The prototypes have feat_dim={feat_dim} channels, the dense '
                f'projections {points.size(1)}. Set category.feat_dim='
                f'{points.size(1)}.')
        prototypes = F.normalize(self.prototypes, dim=1)
        with torch.no_grad():
            scores = points @ prototypes.t() / self.epsilon
            target = sinkhorn(scores, self.sinkhorn_iters)[own]
        logits = query @ prototypes.t() / self.temperature
        losses = F.cross_entropy(logits, target, reduction='none')
        return losses, scores.argmax(dim=1), prototypes.detach()
