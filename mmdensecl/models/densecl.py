# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""DenseCL: MoCo-v2 plus contrast between matched cells."""

import warnings

import torch
import torch.nn as nn
from mmengine.dist import all_gather
from mmpretrain.structures import DataSample
from torch import Tensor

from mmdensecl.registry import MODELS, TASK_UTILS

from .correspondence import Match, stack_views
from .distributed import SyncedGenerator, draw_positions
from .metrics import match_metrics, position_r2
from .moco import MoCoV2
from .modules import (
    FeatureQueue,
    Features,
    check_at_least,
    gather_positions,
    l2_normalize,
    last_map,
)


@MODELS.register_module()
class DenseCL(MoCoV2):
    """DenseCL: MoCo-v2 plus contrast between matched grid cells.

    `Dense Contrastive Learning for Self-Supervised Visual Pre-Training
    <https://arxiv.org/abs/2011.09157>`_; the numbers follow the authors' code
    (https://github.com/WXinlong/DenseCL). The loss is
    ``(1 - loss_lambda) * global + loss_lambda * dense`` (eq. 3).

    Args:
        correspondence: Config of the matching rule, see
            :mod:`mmdensecl.models.correspondence`.
        loss_lambda: Weight of the dense loss, 0 to 1.
        dense_negatives: What the dense queue holds: 'pooled', the mean dense
            projection of each image, as published; or 'cells', projections of
            single cells of each image, drawn at random, after DenseCL++
            (https://arxiv.org/abs/2210.05063).
        cells_per_image: Cells that each image gives to the dense queue with
            'cells'. The queue keeps its length, so it spans fewer images.
        **kwargs: The arguments of :class:`MoCoV2`; the neck must be one like
            :class:`DenseCLNeck`.
    """

    def __init__(
        self,
        *args,
        correspondence: dict = dict(type='mmdensecl.BackboneSimilarity'),
        loss_lambda: float = 0.5,
        dense_negatives: str = 'pooled',
        cells_per_image: int = 1,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= loss_lambda <= 1:
            raise ValueError(
                f'loss_lambda must be in [0, 1], got {loss_lambda}'
            )
        if dense_negatives not in ('pooled', 'cells'):
            raise ValueError(
                "dense_negatives must be 'pooled' or 'cells', "
                f'got {dense_negatives!r}'
            )
        check_at_least(1, cells_per_image=cells_per_image)
        self.loss_lambda = loss_lambda
        self.correspondence = TASK_UTILS.build(correspondence)
        self.dense_queue = FeatureQueue(*self.queue.keys.shape)
        self.cells_per_image = cells_per_image
        self.cell_sampler = (
            SyncedGenerator() if dense_negatives == 'cells' else None
        )

    def encode(
        self, backbone: nn.Module, neck: nn.Module, images: Tensor
    ) -> Features:
        feature_map = last_map(backbone(images))
        if feature_map.dim() != 4:
            raise ValueError(
                f'{type(backbone).__name__} gave {feature_map.dim()}-D '
                'features, the dense branch needs a map (N, C, H, W). For '
                'ConvNeXt set gap_before_final_norm=False, for a vision '
                "transformer out_type='featmap'."
            )
        # (N, C, H, W) -> (N, D), (N, D, P), (N, D), on a grid of P cells
        vector, dense, mean = neck((feature_map,))
        # Matching picks indices, so nothing here needs a gradient.
        feats = feature_map.detach()  # (N, C, H, W)
        pool = getattr(neck, 'pool', None)  # mmpretrain's neck may have none
        if pool is not None:
            feats = pool(feats)  # (N, C, S, S), P = S * S
        if feats[0, 0].numel() == 1:
            warnings.warn(
                'The grid of the dense branch is a single cell: nothing can '
                'be matched, and match_acc is 100 whatever is learnt. Enlarge '
                'the views, neck.num_grid or the map of the backbone.',
                stacklevel=2,
            )
        features = Features(
            l2_normalize(vector),
            l2_normalize(dense),
            l2_normalize(mean),
            shape=(feats.size(2), feats.size(3)),
        )
        if not self.correspondence.reads_backbone:
            return features
        feats = feats.flatten(start_dim=2)  # (N, C, P)
        return features._replace(backbone_feats=l2_normalize(feats))

    def contrast(
        self,
        query: Features,
        key: Features,
        data_samples: list[DataSample] | None,
    ) -> dict[str, Tensor]:
        outputs = super().contrast(query, key, data_samples)
        device = query.global_proj.device
        views = stack_views(data_samples, device)
        # In full precision also under AMP: an arg-max has no middle ground.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            match = self.correspondence(query, key, views)
        global_loss = outputs['loss_global']
        outputs['loss_global'] = (1 - self.loss_lambda) * global_loss
        outputs.update(self.contrast_cells(query, key, match))
        outputs.update(match_metrics(match, query, key, views))
        return outputs

    def contrast_cells(
        self, query: Features, key: Features, match: Match
    ) -> dict[str, Tensor]:
        """Losses and metrics of matched cells."""
        weight = match.weight
        loss, metrics = self.head.loss(
            # (N, D, P) -> (N * P, D), and the positive of each row
            query.dense_proj.transpose(1, 2).flatten(0, 1),
            gather_positions(key.dense_proj, match.index),
            self.dense_queue.negatives,
            None if weight is None else weight.flatten(0, 1),
        )
        outputs = {f'dense_{name}': x for name, x in metrics.items()}
        return dict(
            loss_dense=self.loss_lambda * loss,
            **outputs,
            position_r2=position_r2(query.dense_proj),
        )

    def enqueue(self, key: Features) -> None:
        """Put the keys of all ranks into both queues, in one exchange."""
        keys = torch.cat([key.global_proj[:, None], self.dense_keys(key)], 1)
        rows = torch.cat(all_gather(keys))  # (W * N, 1 + m, D), W processes
        self.queue.enqueue(rows[:, 0])
        self.dense_queue.enqueue(rows[:, 1:].flatten(0, 1))

    def dense_keys(self, key: Features) -> Tensor:
        """What each image gives to the dense queue, (N, m, D)."""
        if self.cell_sampler is None:
            return key.dense_proj_mean[:, None]
        num_images, _, num_cells = key.dense_proj.shape
        generator = self.cell_sampler.next_generator(key.dense_proj.device)
        index = draw_positions(
            num_images, num_cells, self.cells_per_image, generator
        )
        rows = gather_positions(key.dense_proj, index)  # (N * m, D)
        return rows.unflatten(0, (num_images, -1))
