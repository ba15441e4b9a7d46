# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from mmengine.model import BaseModule
from torch import Tensor

from mmdensecl.registry import MODELS
from ..distributed import mean_over_positives, mean_over_ranks
from ..metrics import contrast_metrics


@MODELS.register_module()
class ContrastiveHead(BaseModule):
    """Contrast query rows with their keys and a queue of negatives.

    One head serves the global and the dense branch: a row is an image in
    the first and a grid cell in the second.

    Args:
        loss: Config of the loss. Defaults to
            ``dict(type='mmdensecl.InfoNCE')``.
        init_cfg: Initialisation. Defaults to
            None; the head has no parameters.
    """

    def __init__(self,
                 loss: dict = dict(type='mmdensecl.InfoNCE'),
                 init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss)

    def loss(
            self,
            query: Tensor,
            key: Tensor,
            queue: Tensor,
            weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the rows that have a positive, and what to log.

        Of several positives of a row the mean is taken first, so that each
        row weighs the same.

        Args:
            query: Normalised queries, (M, D).
            key: The key of each query, normalised, (M, D), or its
                keys, (M, k, D).
            queue: Normalised negatives, (K, D).
            weight: What each positive counts, bool or float, (M, ) or (M, k).
                None means 1. Defaults to None.

        Returns:
            The scalar loss of
            :func:`mmdensecl.models.distributed.mean_over_ranks`, 0 where no
            row has a positive; and the metrics of
            :func:`mmdensecl.models.metrics.contrast_metrics`.
        """
        result = self.loss_module(query, key, queue)
        loss = mean_over_ranks(*mean_over_positives(result.loss, weight))
        return loss, contrast_metrics(result, weight)
