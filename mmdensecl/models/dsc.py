# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""DSC: DenseCL with several neighbours and categories across images.

Our interpretation of the paper (https://arxiv.org/abs/2109.07756), of which
the abstract alone was at hand. What it leaves open is an argument.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import all_gather, get_rank
from mmengine.model import BaseModule
from torch import Generator, Tensor

from mmdensecl.registry import MODELS

from .clustering import assign_clusters, sinkhorn, spherical_kmeans
from .correspondence import Match
from .densecl import DenseCL
from .distributed import SyncedGenerator, draw_positions, mean_over_ranks
from .losses import sup_con
from .metrics import category_metrics
from .modules import Features, check_at_least, check_positive, gather_positions


@MODELS.register_module()
class DSC(DenseCL):
    """DenseCL with several neighbours and categories across images.

    None of the paper's numbers is claimed: its code was never published. The
    loss is ``(1 - loss_lambda) * global + loss_lambda * neighbours +
    category_weight * category``. With one neighbour and ``category_weight=0``
    this is DenseCL, bit for bit, also from the same seed.

    Args:
        category: Config of a category head: :class:`KMeansCategoryHead` is
            DSC-KM, :class:`PrototypeCategoryHead` DSC-PM.
        category_weight: Weight of the category loss; the default is that of
            the other two.
        num_samples: Query cells of an image, drawn anew in each step, that
            take part in the category loss. Defaults to 16, a third of a 7 x 7
            grid, to bound the memory of a large batch.
        correspondence: Config of the matching rule, which gives the
            neighbours. An anchor's partner in the category loss is its first.
        **kwargs: The arguments of :class:`DenseCL`.
    """

    def __init__(
        self,
        *args,
        category: dict,
        category_weight: float = 0.5,
        num_samples: int = 16,
        correspondence: dict = dict(type='mmdensecl.NearestNeighbors'),
        **kwargs,
    ) -> None:
        super().__init__(*args, correspondence=correspondence, **kwargs)
        check_at_least(0, category_weight=category_weight)
        check_at_least(1, num_samples=num_samples)
        self.category_weight = category_weight
        self.num_samples = num_samples
        self.category_head = MODELS.build(category)
        self.category_randomness = SyncedGenerator()

    def contrast_cells(
        self, query: Features, key: Features, match: Match
    ) -> dict[str, Tensor]:
        """Losses and metrics of matched cells and of their categories."""
        outputs = super().contrast_cells(query, key, match)
        generator = self.category_randomness.next_generator(
            query.dense_proj.device
        )
        anchors = self.draw_anchors(query, generator)
        index, weight = match.best
        # Also at weight 0: DDP waits for a gradient of every parameter.
        loss, metrics = self.category_head.loss(
            gather_positions(query.dense_proj, anchors),
            gather_positions(key.dense_proj, index.gather(1, anchors)),
            None if weight is None else weight.gather(1, anchors).flatten(),
            generator,
        )
        return dict(
            **outputs, loss_category=self.category_weight * loss, **metrics
        )

    def draw_anchors(self, query: Features, generator: Generator) -> Tensor:
        """Query cells for the category loss, distinct, (N, num_samples).

        The generator is in the same state on all ranks.
        """
        num_images, _, num_cells = query.dense_proj.shape
        return draw_positions(
            num_images, num_cells, self.num_samples, generator
        )


class CategoryHead(BaseModule):
    """What category heads share: the mini-batch of all ranks.

    A head says in :meth:`contrast` what the loss of an anchor is, and, for the
    metrics, which category a point has: the nearest of the centres.
    """

    def loss(
        self,
        query_points: Tensor,
        key_points: Tensor,
        weight: Tensor | None,
        generator: Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the anchors that have a partner, and what to log.

        In float32 at least, also under autocast.

        Args:
            query_points: Anchors of this rank, normalised, (M, D).
            key_points: The partner of each anchor in the other view,
                normalised, (M, D). No gradient flows into it.
            weight: What each anchor counts, (M, ). None means 1.
            generator: In the same state on all ranks.

        Returns:
            The scalar of ``mean_over_ranks`` and the ``category_metrics``.
        """
        with torch.autocast(query_points.device.type, enabled=False):
            if query_points.itemsize < 4:
                query_points = query_points.float()
            key_points = key_points.detach().to(query_points)
            points = torch.cat(all_gather(key_points.contiguous()))
            start = get_rank() * len(key_points)
            own = slice(start, start + len(key_points))
            losses, labels, centers = self.contrast(
                query_points, points, own, generator
            )
            predicted = assign_clusters(query_points.detach(), centers)
            metrics = category_metrics(
                labels, labels[own], predicted, len(centers), weight
            )
            return mean_over_ranks(losses, weight), metrics

    def contrast(
        self, query: Tensor, points: Tensor, own: slice, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each anchor.

        Args:
            query: Anchors of this rank, (M, D), with gradient.
            points: Key points of all ranks, (G, D).
            own: Which of them are the partners of the anchors.
            generator: In the same state on all ranks.

        Returns:
            Losses, (M, ); the category of each point, (G, ); and the
            categories' centres, normalised and without gradient, (K, D).
        """
        raise NotImplementedError


@MODELS.register_module()
class KMeansCategoryHead(CategoryHead):
    """DSC-KM: k-means over the mini-batch, then supervised contrast.

    The key points of all ranks are clustered anew in each step (spherical
    k-means). An anchor's label is the cluster of its partner, its positives
    are all key points of that cluster, from whichever image.

    Args:
        num_clusters: Clusters of a mini-batch. Defaults to 64: of the order
            of the classes of COCO, and 64 points each at 256 images with 16
            points.
        num_iters: Iterations of k-means. Defaults to 10: after a k-means++
            start little moves later.
        temperature: Divides the similarities.
    """

    def __init__(
        self,
        num_clusters: int = 64,
        num_iters: int = 10,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        check_at_least(2, num_clusters=num_clusters)
        check_at_least(0, num_iters=num_iters)
        check_positive(temperature=temperature)
        self.num_clusters = num_clusters
        self.num_iters = num_iters
        self.temperature = temperature

    def contrast(
        self, query: Tensor, points: Tensor, own: slice, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        if len(points) < self.num_clusters:
            raise ValueError(
                f'k-means cannot find num_clusters={self.num_clusters} '
                f'clusters among the {len(points)} points of a mini-batch '
                '(images of all ranks x num_samples). Lower '
                'category.num_clusters or raise num_samples or the batch.'
            )
        centers = spherical_kmeans(
            points, self.num_clusters, self.num_iters, generator
        )
        labels = assign_clusters(points, centers)
        losses = sup_con(query, points, labels[own], labels, self.temperature)
        return losses, labels, centers


@MODELS.register_module()
class PrototypeCategoryHead(CategoryHead):
    """DSC-PM: learnt prototypes with balanced assignment.

    Prototypes are directions that live on from step to step. The key points
    of all ranks are assigned to them so that each prototype gets as much
    (Sinkhorn-Knopp, which is what keeps all from falling into one), and an
    anchor predicts the assignment of its partner (the swapped prediction of
    SwAV, https://arxiv.org/abs/2006.09882, one way, as the key encoder is not
    trained). The prototypes learn from that prediction.

    Args:
        num_prototypes: Categories of the dataset. Defaults to 64, as many as
            DSC-KM has clusters.
        feat_dim: Channels of the dense projections.
        epsilon: How soft the assignment is; SwAV's by default, as the next
            two.
        sinkhorn_iters: Iterations of Sinkhorn-Knopp.
        temperature: Divides the anchors' similarities.
        init_cfg: Initialisation; None: random directions.
    """

    def __init__(
        self,
        num_prototypes: int = 64,
        feat_dim: int = 128,
        epsilon: float = 0.05,
        sinkhorn_iters: int = 3,
        temperature: float = 0.1,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_at_least(2, num_prototypes=num_prototypes)
        check_at_least(1, feat_dim=feat_dim, sinkhorn_iters=sinkhorn_iters)
        check_positive(epsilon=epsilon, temperature=temperature)
        self.epsilon = epsilon
        self.sinkhorn_iters = sinkhorn_iters
        self.temperature = temperature
        # Not from the generator that the encoders are drawn from: the same
        # seed gives the weights of a DenseCL.
        own = torch.Generator().manual_seed(torch.initial_seed())
        directions = torch.randn(num_prototypes, feat_dim, generator=own)
        self.prototypes = nn.Parameter(F.normalize(directions, dim=1))

    def contrast(
        self, query: Tensor, points: Tensor, own: slice, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        feat_dim = self.prototypes.size(1)
        if points.size(1) != feat_dim:
            raise ValueError(
                f'The prototypes have feat_dim={feat_dim} channels, the dense '
                f'projections {points.size(1)}. Set category.feat_dim='
                f'{points.size(1)}.'
            )
        prototypes = F.normalize(self.prototypes, dim=1)
        with torch.no_grad():
            scores = points @ prototypes.t() / self.epsilon
            target = sinkhorn(scores, self.sinkhorn_iters)[own]
        logits = query @ prototypes.t() / self.temperature
        losses = F.cross_entropy(logits, target, reduction='none')
        return losses, scores.argmax(dim=1), prototypes.detach()
