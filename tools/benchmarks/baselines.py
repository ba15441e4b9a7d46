# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The models that the scripts here compare, as their authors publish them."""

import logging
from pathlib import Path

import mmcv
import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

# mmcv hands numpy a negative Python number to wrap around, which numpy 2
# refuses; it still wraps one of its own. No slower.
_adjust_hue = mmcv.adjust_hue
mmcv.adjust_hue = lambda image, factor, *args, **kwargs: _adjust_hue(
    image, np.float64(factor), *args, **kwargs
)

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
OURS = {
    'DenseCL': 'densecl_r50_8xb32-coslr-200e.py',
    'DSC-KM': 'dsc_km_r50_8xb32-coslr-200e.py',
    'DSC-PM': 'dsc_pm_r50_8xb32-coslr-200e.py',
    'MoCo-v2': 'mocov2_r50_8xb32-coslr-200e.py',
}
MMPRETRAIN = {
    'mmpretrain DenseCL': 'densecl/densecl_resnet50_8xb32-coslr-200e_in1k.py',
    'mmpretrain MoCo-v2': 'mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py',
}


def config(name: str) -> Config:
    """A pre-training config.

    Args:
        name (str): A key of ``OURS`` or ``MMPRETRAIN``, or a config file.

    Returns:
        Config: As published.
    """
    if name in MMPRETRAIN:
        return get_config(f'mmpretrain::{MMPRETRAIN[name]}')
    return Config.fromfile(CONFIGS / OURS[name] if name in OURS else name)


def precision_of(cfg: Config) -> str:
    """The type that a config's optimiser wrapper casts to."""
    wrapper = cfg.optim_wrapper
    return {
        'OptimWrapper': 'float32',
        'AmpOptimWrapper': wrapper.get('dtype') or 'float16',
        'mmdensecl.BFloat16OptimWrapper': 'bfloat16',
    }[wrapper.get('type', 'OptimWrapper')]


def build(cfg: Config, device: str) -> nn.Module:
    """A config's model, in training mode.

    Args:
        cfg (Config): Of :func:`config`.
        device (str): Where its weights are to be.

    Returns:
        nn.Module: With the same seed for all.
    """
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    logging.disable(logging.INFO)  # mmengine lists every weight
    model.init_weights()
    logging.disable(logging.NOTSET)
    return model.to(device).train()


def views(batch: int, size: int, device: str) -> dict[str, list]:
    """A batch as the data preprocessor gives it: two normalised views."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Tensor] = [
        torch.randn(batch, 3, size, size, generator=generator).to(device)
        for _ in range(2)
    ]
    samples = []
    for _ in range(batch):
        sample = DataSample()
        sample.set_metainfo(
            dict(
                views=[
                    (0.0, 0.0, size, size, 0.0),
                    (9.0, 9.0, size, size, 1.0),
                ]
            )
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)
