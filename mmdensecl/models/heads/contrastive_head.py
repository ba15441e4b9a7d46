# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import Dict, List, Optional, Tuple, Union

from mmengine.model import BaseModule
from torch import Tensor

from mmdensecl.registry import MODELS
from ..monitors import contrast_monitors
from ..row_means import mean_over_positives, mean_over_ranks


@MODELS.register_module()
class ContrastiveHead(BaseModule):
    """Contrast query rows with their keys and a queue of negatives.

    One head serves the global and the dense branch: a row is a picture in
    the first and a grid cell in the second.

    Args:
        loss (dict): Config of the loss. Defaults to
            ``dict(type='mmdensecl.InfoNCE')``.
        init_cfg (dict | list[dict], optional): Initialisation. Defaults to
            None; the head has no parameters.
    """

    def __init__(self,
                 loss: dict = dict(type='mmdensecl.InfoNCE'),
                 init_cfg: Optional[Union[dict, List[dict]]] = None) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss)

    def loss(
            self,
            query: Tensor,
            key: Tensor,
            queue: Tensor,
            valid: Optional[Tensor] = None
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Mean loss over the rows that have a positive, and what to log.

        Of several positives of a row the mean is taken first, so that each
        row weighs the same.

        Args:
            query (Tensor): Normalised queries, (M, D).
            key (Tensor): The key of each query, normalised, (M, D), or its
                keys, (M, k, D).
            queue (Tensor): Normalised negatives, (K, D).
            valid (Tensor, optional): Which keys are positives, bool, (M, ) or
                (M, k). None means all. Defaults to None.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: The scalar loss of
            :func:`mmdensecl.models.row_means.mean_over_ranks`, 0 where no row
            has a positive; and the monitors of
            :func:`mmdensecl.models.monitors.contrast_monitors`.
        """
        result = self.loss_module(query, key, queue)
        loss = mean_over_ranks(*mean_over_positives(result.loss, valid))
        return loss, contrast_monitors(result, valid)
