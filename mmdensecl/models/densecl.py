# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import Dict, List, Optional

import torch
import torch.nn as nn
from mmengine.dist import all_gather
from mmpretrain.structures import DataSample
from torch import Tensor

from mmdensecl.registry import MODELS, TASK_UTILS
from .correspondence import Match
from .features import Features, gather_cells, l2_normalize
from .geometry import stack_views
from .momentum_contrast import MoCoV2
from .monitors import match_monitors, position_share
from .queue import FeatureQueue


@MODELS.register_module()
class DenseCL(MoCoV2):
    """DenseCL: MoCo-v2 plus contrast between matched grid cells.

    `Dense Contrastive Learning for Self-Supervised Visual Pre-Training
    <https://arxiv.org/abs/2011.09157>`_; the numbers follow the authors' code
    (https://github.com/WXinlong/DenseCL). The loss is
    ``(1 - loss_lambda) * global + loss_lambda * dense`` (eq. 3). The negatives
    of the dense branch are mean dense projections, one for each picture, in a
    queue of their own.

    Args:
        correspondence (dict): Config of the matching rule, see
            :mod:`mmdensecl.models.correspondence`. Defaults to
            ``dict(type='mmdensecl.BackboneSimilarity')``.
        loss_lambda (float): Weight of the dense loss, 0 to 1. Defaults to
            0.5.
        **kwargs: The arguments of :class:`MoCoV2`; the neck must be one like
            :class:`DenseCLNeck`.

    Raises:
        ValueError: ``loss_lambda`` is not in [0, 1], or the backbone gives no
            4-D map.
    """

    def __init__(self,
                 *args,
                 correspondence: dict = dict(
                     type='mmdensecl.BackboneSimilarity'),
                 loss_lambda: float = 0.5,
                 **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= loss_lambda <= 1:
            raise ValueError(
                f'loss_lambda must be in [0, 1], got {loss_lambda}')
        self.loss_lambda = loss_lambda
        self.correspondence = TASK_UTILS.build(correspondence)
        self.dense_queue = FeatureQueue(*self.queue.keys.shape)

    def encode(self, backbone: nn.Module, neck: nn.Module,
               images: Tensor) -> Features:
        """Features of one batch of views by one encoder."""
        maps = backbone(images)
        feature_map = maps[-1] if isinstance(maps, (tuple, list)) else maps
        if feature_map.dim() != 4:
            raise ValueError(
                f'{type(backbone).__name__} gave {feature_map.dim()}-D '
                'features, the dense branch needs a map (N, C, H, W). For '
                'ConvNeXt set gap_before_final_norm=False, for a vision '
                "transformer out_type='featmap'.")
        outputs = [l2_normalize(x) for x in neck((feature_map, ))]
        # Matching picks indices, so nothing here needs a gradient.
        cells = neck.pool(feature_map.detach())
        shape = tuple(cells.shape[2:])
        if not self.correspondence.reads_backbone:
            return Features(*outputs, shape=shape)
        cells = l2_normalize(cells.flatten(start_dim=2))
        return Features(*outputs, cells=cells, shape=shape)

    def contrast(
            self, query: Features, key: Features,
            data_samples: Optional[List[DataSample]]) -> Dict[str, Tensor]:
        """Losses and monitors of a step; the queues stay as they are."""
        outputs = super().contrast(query, key, data_samples)
        views = stack_views(data_samples, query.vector.device)
        # In full precision also under AMP: an arg-max has no middle ground.
        with torch.no_grad(), torch.autocast(
                query.vector.device.type, enabled=False):
            match = self.correspondence(query, key, views)
        outputs['loss_global'] = (1 -
                                  self.loss_lambda) * outputs['loss_global']
        outputs.update(self.contrast_cells(query, key, match))
        outputs.update(match_monitors(match, query, key, views))
        return outputs

    def contrast_cells(self, query: Features, key: Features,
                       match: Match) -> Dict[str, Tensor]:
        """Losses and monitors of matched cells."""
        loss, monitors = self.head.loss(
            query.grid.transpose(1, 2).flatten(0, 1),
            gather_cells(key.grid, match.index), self.dense_queue.keys,
            None if match.valid is None else match.valid.flatten(0, 1))
        outputs = {f'dense_{name}': x for name, x in monitors.items()}
        return dict(
            loss_dense=self.loss_lambda * loss,
            **outputs,
            dense_position=position_share(query.grid))

    def enqueue(self, key: Features) -> None:
        """Put the keys of all ranks into both queues, in one exchange."""
        both = torch.stack([key.vector, key.pooled], dim=1)
        vector, pooled = torch.cat(all_gather(both)).unbind(dim=1)
        self.queue.enqueue(vector)
        self.dense_queue.enqueue(pooled)
