# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What mmdet's detectors need to be fine-tuned as the papers do it.

Nothing imports this module, as it needs mmdet; a config that names a type of
it says ``custom_imports=dict(imports=['mmdensecl.transfer.mmdet'])``.
"""

from mmcv.cnn import build_norm_layer
from mmdet.models.backbones import ResNet
from mmdet.models.roi_heads.shared_heads import ResLayer
from torch import Tensor

from mmdensecl.registry import MODELS


@MODELS.register_module()
class ResLayerExtraNorm(ResLayer):
    """A stage of a ResNet with a norm after it, the head of a C4 detector.

    `MoCo <https://arxiv.org/abs/1911.05722>`_ added that norm to res5, as
    self-supervised features are not of the magnitude that the layers behind
    them were tuned for, and those who followed kept it.

    The norm is named ``norm`` and no checkpoint of a backbone holds it:
    ``init_cfg=dict(type='mmdensecl.PretrainedBackbone', checkpoint=...,
    allow_random=['norm.*'])``.

    Args:
        depth: Depth of the ResNet.
        stage: Index of the stage; 3 is res5.
        norm_cfg: Norms of the stage and the one after it; None for BN.
        frozen: Whether the stage keeps its weights and its statistics in
            training. The norm after it learns all the same.
        **kwargs: Other arguments of mmdet's ``ResLayer``, but ``norm_eval``.
    """

    def __init__(
        self,
        depth: int,
        stage: int = 3,
        norm_cfg: dict | None = None,
        frozen: bool = False,
        **kwargs,
    ) -> None:
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)
        # mmdet's norm_eval knows nn.BatchNorm2d only: with SyncBN it would
        # do nothing, without a word.
        super().__init__(
            depth, stage=stage, norm_cfg=norm_cfg, norm_eval=False, **kwargs
        )
        block, _ = ResNet.arch_settings[depth]
        channels = 64 * 2**stage * block.expansion
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.frozen = frozen
        if frozen:
            self.res_layer.requires_grad_(False)

    @property
    def res_layer(self):
        """The stage, under the name that it has in a ResNet."""
        return getattr(self, f'layer{self.stage + 1}')

    def forward(self, x: Tensor) -> Tensor:
        """The stage, then the norm."""
        return self.norm(super().forward(x))

    def train(self, mode: bool = True) -> 'ResLayerExtraNorm':
        """Keep a frozen stage in eval mode."""
        super().train(mode)
        if self.frozen:
            self.res_layer.eval()
        return self
