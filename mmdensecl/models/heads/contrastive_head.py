# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import Dict, List, Optional, Tuple, Union

import torch
from mmengine.dist import all_reduce
from mmengine.model import BaseModule
from torch import Tensor

from mmdensecl.registry import MODELS
from ..monitors import contrast_monitors


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

        Args:
            query (Tensor): Normalised queries, (M, D).
            key (Tensor): The key of each query, normalised, (M, D).
            queue (Tensor): Normalised negatives, (K, D).
            valid (Tensor, optional): Which rows have a positive, bool,
                (M, ). None means all. Defaults to None.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: The scalar loss, 0 where no row
            is valid; its mean over the ranks is the mean over the valid rows
            of all of them; and the monitors of
            :func:`mmdensecl.models.monitors.contrast_monitors`.
        """
        result = self.loss_module(query, key, queue)
        monitors = contrast_monitors(result, valid)
        if valid is None:
            return result.loss.mean(), monitors
        # DDP averages over ranks; each divides by the mean count, so that two
        # ranks give the loss that one process would.
        count = valid.sum().to(result.loss)
        all_reduce(count, op='mean')
        count = count.where(count > 0, torch.ones_like(count))
        return (result.loss * valid).sum() / count, monitors
