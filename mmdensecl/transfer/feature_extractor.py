# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A pre-trained backbone in a few lines of Python.

::

    import mmdensecl
    backbone = mmdensecl.load_backbone('work_dirs/densecl/epoch_200.pth')
    dense = backbone.extract_dense('photo.jpg')  # (C, h, w)
"""

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import DefaultScope
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torchvision.transforms.v2 import functional as F

from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.datasets.unlabeled import UnreadableImageError
from mmdensecl.models.modules import last_map
from mmdensecl.registry import MODELS

from .architecture import infer_config
from .pretrained_backbone import PretrainedBackbone
from .read_backbone import NoBackboneError, read_backbone
from .run_info import are_rgb, normalisation

# ImageNet's, RGB, 0 to 255: what the shipped configs train with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

BATCH = 16  # images at a time

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


class FrozenBackbone(nn.Module):
    """A frozen feature extractor: eval mode, no gradients.

    Args:
        backbone: Gives a map (N, C, h, w), or several, of which the last is
            taken.
        cfg: What it was built from, for another one like it.
        mean: What is subtracted from each channel, RGB, 0 to 255.
        std: What each is divided by.
        scope: What the types in ``cfg`` are relative to.
        origin: Where the weights are from: ``checkpoint``, ``sha256``,
            ``source`` and what :func:`.run_info.read_run` found; empty for
            random weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        cfg: dict,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        scope: str = 'mmpretrain',
        origin: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.cfg = cfg
        self.scope = scope
        self.origin = origin or {}
        for name, values in (('mean', mean), ('std', std)):
            tensor = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def copy_of(cls, model: Any) -> 'FrozenBackbone':
        """A frozen copy of the backbone of a model in training."""
        model = model.module if is_model_wrapper(model) else model
        preprocessor = model.data_preprocessor
        device = next(model.backbone.parameters()).device
        return cls(
            deepcopy(model.backbone),
            {},
            getattr(preprocessor, 'mean', torch.zeros(3)).flatten().tolist(),
            getattr(preprocessor, 'std', torch.ones(3)).flatten().tolist(),
        ).to(device)

    def train(self, mode: bool = True) -> 'FrozenBackbone':
        """Stay in eval mode, also as a part of a model that trains."""
        return self

    def untrained(self, images: Tensor, seed: int = 0) -> 'FrozenBackbone':
        """The same network with random weights, the baseline.

        Weights are drawn as for a training, from a generator of their own.
        Batch norms get the statistics of the images, as training would have
        given them; as they start, with mean 0 and variance 1, they do not
        normalise.

        Args:
            images: RGB, 0 to 255, such as those to extract, (N, 3, H, W).
            seed: Seed of the weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = _build(self.cfg, self.scope)
            module.init_weights()
        # A synchronised norm cannot be trained on a CPU.
        module = revert_sync_batchnorm(module).to(self.mean.device)
        update_bn(map(self.normalize, images.split(BATCH)), module)
        mean, std = (x.flatten().tolist() for x in (self.mean, self.std))
        return FrozenBackbone(module, self.cfg, mean, std, self.scope).to(
            self.mean.device
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Images of 0 to 255 as the network takes them."""
        if images.is_floating_point() and ((images <= 1).all() & images.any()):
            warnings.warn(
                'Images of 0 to 255 are expected, and these are floats of at '
                'most 1: multiply them by 255',
                stacklevel=2,
            )
        images = images.to(self.mean.device, self.mean.dtype)
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """The last map (N, C, h, w) of a batch of RGB images of 0 to 255.

        Raises:
            ValueError: It is no batch of RGB images, or the backbone gives no
                map.
        """
        if images.dim() != 4 or images.size(1) != 3:
            raise ValueError(
                'Expected a batch of RGB images (N, 3, H, W), '
                f'got {tuple(images.shape)}'
            )
        last = last_map(self.backbone(self.normalize(images)))
        if last.dim() != 4:
            raise ValueError(
                f'{type(self.backbone).__name__} gives no map (N, C, h, w) '
                f'but {tuple(last.shape)}; for a vision transformer set '
                "backbone=dict(out_type='featmap', ...)"
            )
        return last

    @torch.no_grad()
    def extract_dense(
        self, image: ImageLike | Sequence[ImageLike], size: int | None = None
    ) -> Any:
        """The dense map of an image, or of each of a list of them.

        Images keep their aspect ratio; those of one shape are batched.

        Args:
            image: A path, read as in training; a PIL image; RGB of 0 to 255
                as an array (H, W, 3) of uint8 or a tensor (3, H, W); or a
                list or tuple of these.
            size: Pixels to which the shorter side is resized; None keeps it.

        Returns:
            (C, h, w), not normalised over its channels, or a list of these.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file or object is no image, or not RGB.
        """
        if not isinstance(image, list | tuple):
            one: Any = image
            return self(as_rgb(one, size)[None])[0]
        images = [as_rgb(x, size) for x in image]
        by_shape: dict[tuple, list[int]] = {}
        for i, x in enumerate(images):
            by_shape.setdefault((x.shape, x.dtype), []).append(i)
        maps: dict[int, Tensor] = {}
        for indices in by_shape.values():
            for start in range(0, len(indices), BATCH):
                batch = indices[start : start + BATCH]
                found = self(torch.stack([images[i] for i in batch]))
                maps.update(zip(batch, found, strict=True))
        return [maps[i] for i in range(len(images))]


def as_rgb(image: ImageLike, size: int | None = None) -> Tensor:
    """An image of any kind as a tensor, RGB, 0 to 255, (3, H, W).

    Arguments and errors are those of :meth:`FrozenBackbone.extract_dense`,
    for a single image.
    """
    if isinstance(image, str | os.PathLike):
        try:
            image = decode_rgb(Path(image).read_bytes())
        except UnreadableImageError as error:
            raise ValueError(
                f'"{image}" is no image that can be read: {error}'
            ) from error
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert('RGB'))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ValueError(
                'An array must be RGB of uint8, (H, W, 3), got '
                f'{image.dtype} {image.shape}'
            )
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.dim() != 3 or len(image) != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image)
        raise ValueError(
            'An image is a path, a PIL image, an array (H, W, 3) or a tensor '
            f'(3, H, W), got {got}'
        )
    return image if size is None else F.resize(image, [size], antialias=True)


def load_backbone(
    path: str | os.PathLike | None,
    device: str | torch.device = 'cpu',
    prefix: str | None = None,
    config: str | os.PathLike | Config | None = None,
    backbone: dict | None = None,
) -> FrozenBackbone:
    """Build the backbone of a checkpoint and load it, all of it or nothing.

    Takes every format of :func:`mmdensecl.transfer.read_backbone`. A ResNet's
    depth, width, groups and stem are inferred from its tensors, and so is an
    HRNet's width. Strides, dilations and padding of a ResNet, and the
    normalisation, are those of the config in a training checkpoint, of which
    plain values are read and nothing is run, or of the record in a file of
    ``publish_backbone.py``. A file without either is taken for a ResNet of
    strides (1, 2, 2, 2); where it was trained otherwise, give ``config``.

    Args:
        path: A file or an http(s) address. None gives random weights, the
            baseline; then give ``backbone`` or ``config``.
        device: Where the backbone goes.
        prefix: Where in the file the backbone is; None finds it.
        config: The config of the run that wrote the file, with
            ``model.backbone`` in it.
        backbone: Config of the backbone, in mmpretrain's scope unless its
            type names another.

    Returns:
        In eval mode, with its normalisation inside.

    Raises:
        ValueError: The file is no checkpoint, does not fit the backbone, or
            the backbone cannot be inferred; both ``config`` and ``backbone``
            are given, or neither and no file. Besides the errors of
            :func:`mmdensecl.transfer.read_backbone`.
    """
    if config is not None and backbone is not None:
        raise ValueError('Give config or backbone, not both')
    if path is None and config is None and backbone is None:
        raise ValueError(
            'Random weights need an architecture: give '
            "backbone=dict(type='ResNet', depth=50), or config="
        )
    found: Any = None if path is None else read_backbone(path, prefix)
    rgb = {} if found is None else found.run
    scope = 'mmpretrain'
    if config is not None:
        cfg = config if isinstance(config, Config) else Config.fromfile(config)
        model: Any = cfg.get('model') or {}
        if not isinstance(model.get('backbone'), dict):
            raise ValueError(
                f'The config "{cfg.filename}" has no model.backbone'
            )
        backbone, rgb = model.backbone.to_dict(), normalisation(model)
        scope = cfg.get('default_scope') or scope
    elif backbone is None:
        run, arch = found.run, found.arch
        try:
            backbone = infer_config(
                found.state_dict, arch, run.get('backbone')
            )
        except ValueError as error:
            raise NoBackboneError(
                f'"{path}" holds {arch or "no ResNet"}, which cannot be built '
                f'from its tensors: {error}. Give config=, the config of its '
                "run, or backbone=dict(type='...')"
            ) from error
    images = dict(mean=MEAN, std=STD)
    images |= {k: rgb[k] for k in images if are_rgb(rgb.get(k))}
    backbone = _without_checkpoint(backbone)
    module = _build(backbone, scope)
    origin: dict[str, Any] = {}
    if found is None:
        module.init_weights()
    else:
        PretrainedBackbone(str(path), prefix).load(module, found, images)
        run = {k: x for k, x in found.run.items() if k != 'backbone'}
        file = dict(checkpoint=str(path), sha256=found.sha256)
        origin = {**run, **file, 'source': found.source}
    return FrozenBackbone(
        module, backbone, scope=scope, origin=origin, **images
    ).to(device)


def _build(cfg: dict, scope: str) -> Any:
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg)


def _without_checkpoint(backbone: dict) -> dict:
    """A config that does not ask for the weights that a run started from."""
    given = backbone.get('init_cfg')
    parts = [given] if isinstance(given, dict) else given or []
    kept = [x for x in parts if 'checkpoint' not in x]
    cfg = dict(backbone, init_cfg=kept)
    if not kept:  # the backbone's own rule
        del cfg['init_cfg']
    return cfg
