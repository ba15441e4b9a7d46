# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A pre-trained backbone in a few lines of Python.

::

    import mmdensecl
    backbone = mmdensecl.load_backbone('work_dirs/densecl/epoch_200.pth')
    dense = backbone.extract_dense('photo.jpg')  # (C, h, w)
"""
import ast
import os
import re
from pathlib import Path
from typing import (Any, Dict, List, Mapping, NamedTuple, Optional, Sequence,
                    Union)

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.v2 import functional as F

from mmdensecl.checkpoint import download, load_from_local
from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.datasets.unlabeled import UnreadableImageError
from mmdensecl.registry import MODELS
from mmdensecl.transfer import (NoBackboneError, PretrainedBackbone,
                                read_backbone)
from mmdensecl.transfer.read_backbone import DEEP_STEMS

# Of ImageNet, RGB, 0 to 255: what the shipped configs train with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

BATCH = 16  # pictures at a time

PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')  # of Conv2d

Picture = Union[str, os.PathLike, Image.Image, np.ndarray, Tensor]


class FrozenBackbone(nn.Module):
    """A backbone that is only looked through.

    It is in eval mode, stays there, and its weights take no gradient.

    Args:
        backbone (nn.Module): Gives a map (N, C, h, w), or several, of which
            the last is taken.
        cfg (dict): What it was built from, for another one like it.
        mean (Sequence[float]): What is subtracted from each colour, RGB, 0 to
            255. Defaults to ImageNet's.
        std (Sequence[float]): What each is divided by. Defaults to
            ImageNet's.
        scope (str): What the types in ``cfg`` are relative to. Defaults to
            'mmpretrain'.
    """

    def __init__(self,
                 backbone: nn.Module,
                 cfg: dict,
                 mean: Sequence[float] = MEAN,
                 std: Sequence[float] = STD,
                 scope: str = 'mmpretrain') -> None:
        super().__init__()
        self.backbone = backbone
        self.cfg = cfg
        self.scope = scope
        for name, values in (('mean', mean), ('std', std)):
            values = torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> 'FrozenBackbone':
        """Stay in eval mode, also as a part of a model that trains."""
        return self

    def untrained(self, images: Tensor, seed: int = 0) -> 'FrozenBackbone':
        """The same network with random weights: what to compare with.

        Weights are drawn as for a training, from a generator of their own.
        Batch norms take the statistics of the pictures, as training would
        have given them; as they start out, with mean 0 and variance 1, they
        do not normalise.

        Args:
            images (Tensor): RGB, 0 to 255, such as those that it will look
                at, (N, 3, H, W).
            seed (int): Of the weights. Defaults to 0.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = _build(self.cfg, self.scope)
            module.init_weights()
        # A synchronised norm cannot be trained on a CPU.
        random = FrozenBackbone(
            revert_sync_batchnorm(module), self.cfg,
            self.mean.flatten().tolist(),
            self.std.flatten().tolist(), self.scope).to(self.mean.device)
        norms = {
            part: part.momentum
            for part in random.modules() if isinstance(part, _BatchNorm)
        }
        for norm in norms:
            norm.momentum = None  # the mean over all batches
            norm.train()
        with torch.no_grad():
            for batch in images.split(BATCH):
                random(batch)
        for norm, momentum in norms.items():
            norm.momentum = momentum
            norm.eval()
        return random

    def forward(self, images: Tensor) -> Tensor:
        """The last map of a batch.

        Args:
            images (Tensor): RGB, 0 to 255, uint8 or floating point,
                (N, 3, H, W).

        Returns:
            Tensor: (N, C, h, w), not normalised over its channels.

        Raises:
            ValueError: It is no batch of RGB pictures, or the backbone gives
                no map.
        """
        if images.dim() != 4 or images.size(1) != 3:
            raise ValueError('Expected a batch of RGB pictures (N, 3, H, W), '
                             f'got {tuple(images.shape)}')
        images = images.to(self.mean.device, self.mean.dtype)
        maps = self.backbone((images - self.mean) / self.std)
        last = maps[-1] if isinstance(maps, (tuple, list)) else maps
        if last.dim() != 4:
            raise ValueError(
                f'{type(self.backbone).__name__} gives no map (N, C, h, w) '
                f'but {tuple(last.shape)}; for a vision transformer say '
                "backbone=dict(out_type='featmap', ...)")
        return last

    @torch.no_grad()
    def extract_dense(
        self,
        image: Picture | Sequence[Picture],
        size: Optional[int] = None,
    ) -> Tensor | list[Tensor]:
        """The dense map of an image, or of each of a list of them.

        Images keep their aspect ratio; those of one shape are batched.

        Args:
            image: A path, read as in training; a PIL image; RGB of 0 to 255,
                as an array (H, W, 3) of uint8 or a tensor (3, H, W); or a
                list or tuple of these.
            size: Pixels to which the shorter side is resized; None keeps it.

        Returns:
            (C, h, w), not normalised over its channels, or a list of such.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file or object is no image, or not RGB.
        """
        if not isinstance(image, (list, tuple)):
            return self(as_rgb(image, size)[None])[0]
        images = [as_rgb(x, size) for x in image]
        by_shape: Dict[tuple, List[int]] = {}
        for i, x in enumerate(images):
            by_shape.setdefault((x.shape, x.dtype), []).append(i)
        maps: Dict[int, Tensor] = {}
        for indices in by_shape.values():
            for start in range(0, len(indices), BATCH):
                batch = indices[start:start + BATCH]
                maps.update(
                    zip(batch, self(torch.stack([images[i] for i in batch]))))
        return [maps[i] for i in range(len(images))]


def as_rgb(image: Picture, size: Optional[int] = None) -> Tensor:
    """A picture of any kind as a tensor.

    Args:
        image (str | PathLike | Image.Image | np.ndarray | Tensor): As of
            :meth:`FrozenBackbone.extract_dense`.
        size (int, optional): Pixels to which its shorter side is resized.
            Defaults to None: as it is.

    Returns:
        Tensor: RGB, 0 to 255, (3, H, W).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture, or no RGB one.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            image = decode_rgb(Path(image).read_bytes())
        except UnreadableImageError as error:
            raise ValueError(f'"{image}" is no picture that can be read: '
                             f'{error}') from error
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert('RGB'))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3, ):
            raise ValueError('An array must be RGB of uint8, (H, W, 3), got '
                             f'{image.dtype} {image.shape}')
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.dim() != 3 or len(image) != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image)
        raise ValueError('A picture is a path, a PIL picture, an array '
                         f'(H, W, 3) or a tensor (3, H, W), got {got}')
    if size is not None:
        image = F.resize(image, [size], antialias=True)
    return image


def load_backbone(path: Optional[Union[str, os.PathLike]],
                  device: Union[str, torch.device] = 'cpu',
                  prefix: Optional[str] = None,
                  config: Optional[Union[str, os.PathLike, Config]] = None,
                  backbone: Optional[dict] = None) -> FrozenBackbone:
    """Build the backbone of a checkpoint and load it, all of it or nothing.

    Every format of :func:`mmdensecl.transfer.read_backbone` will do. A
    ResNet's depth, width, groups and stem are told by its tensors. Its
    strides, dilations and padding are not: they are taken from the config that
    mmengine saves in a training checkpoint, of which plain values are read
    and nothing is run. A file without one, such as a published backbone, is
    taken for a ResNet of strides (1, 2, 2, 2) without dilations; where it was
    trained otherwise, as the small configs here are, name its ``config``.

    Args:
        path (str | PathLike, optional): A file or an http(s) address. None
            gives random weights, to compare with; then say ``backbone`` or
            ``config``.
        device (str | torch.device): Where the backbone goes. Defaults to
            'cpu'.
        prefix (str, optional): Where in the file the backbone is. Defaults
            to None: found by itself.
        config (str | PathLike | Config, optional): The config of the run that
            wrote the file, with ``model.backbone`` in it. Defaults to None.
        backbone (dict, optional): Config of the backbone, in mmpretrain's
            scope unless its type names another. Defaults to None.

    Returns:
        FrozenBackbone: In eval mode, with its normalisation inside.

    Raises:
        ValueError: The file is no checkpoint, does not fit the backbone, or
            the backbone cannot be told; both ``config`` and ``backbone`` are
            given, or neither and no file. Besides the errors of
            :func:`mmdensecl.transfer.read_backbone`.
    """
    if config is not None and backbone is not None:
        raise ValueError('Give config or backbone, not both')
    run = Run({}, {})
    if backbone is not None:
        run = Run(dict(backbone), {})
    elif config is not None:
        run = _read_config(config)
    elif path is not None:
        run = _told_by(path, prefix)
    else:
        raise ValueError('Random weights need an architecture: give '
                         "backbone=dict(type='ResNet', depth=50), or config=")
    cfg = _without_checkpoint(run.backbone)
    module = _build(cfg, run.scope)
    if path is None:
        module.init_weights()
    else:
        PretrainedBackbone(path, prefix=prefix)(module)
    return FrozenBackbone(
        module, cfg, scope=run.scope, **run.normalisation).to(device)


def _build(cfg: dict, scope: str) -> nn.Module:
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


class Run(NamedTuple):
    """What is known of the run that trained a backbone.

    Attributes:
        backbone (dict): Config of the backbone.
        normalisation (dict): ``mean`` and ``std`` of its pictures, where they
            are known.
        scope (str): What the types of the backbone are relative to.
    """
    backbone: dict
    normalisation: Dict[str, List[float]]
    scope: str = 'mmpretrain'


def _read_config(cfg: Union[str, os.PathLike, Config]) -> Run:
    if not isinstance(cfg, Config):
        cfg = Config.fromfile(cfg)
    model = cfg.get('model') or {}
    if not isinstance(model.get('backbone'), dict):
        raise ValueError(f'The config "{cfg.filename}" has no model.backbone')
    return Run(model.backbone.to_dict(), _normalisation(model),
               cfg.get('default_scope') or 'mmpretrain')


def _normalisation(model: Mapping[str, Any]) -> Dict[str, List[float]]:
    """What our own models subtract and divide by.

    Of others the order of colours is not certain.
    """
    found = {}
    if str(model.get('type')).startswith('mmdensecl.'):
        preprocessor = model.get('data_preprocessor') or {}
        for name in ('mean', 'std'):
            values = preprocessor.get(name)
            if isinstance(values, (list, tuple)) and len(values) == 3 and all(
                    isinstance(x, (int, float)) for x in values):
                found[name] = list(values)
    return found if len(found) == 2 else {}


def _told_by(path: Union[str, os.PathLike], prefix: Optional[str]) -> Run:
    """What a file tells of its ResNet, by its tensors and its saved config."""
    found = read_backbone(path, prefix)
    state = found.state_dict
    known = re.match(r'ResNet(V1[cd]|)-(\d+)', found.arch or '')
    if not known:
        raise NoBackboneError(
            f'"{path}" holds {found.arch or "no ResNet"}, which cannot be '
            'built from its tensors alone. Say what it is: config=, the '
            "config of its run, or backbone=dict(type='...')")
    version, depth = known[1], int(known[2])
    stages = sum(f'layer{i}.0.conv1.weight' in state for i in range(1, 5))
    width, per_group = state['layer1.0.conv2.weight'].shape[:2]
    # Or a small file might ask for a network that fits no memory.
    for i in range(stages):
        name = f'layer{i + 1}.0.conv2.weight'
        got, expected = (tuple(state[name].shape) if name in state else 'none',
                         (width << i, per_group << i, 3, 3))
        if got != expected:
            raise ValueError(f'"{path}" holds no whole {found.arch}: {name} '
                             f'is {got}, expected {expected}')
    cfg = dict(
        type=f'ResNet{version}',
        depth=depth,
        base_channels=int(width),
        stem_channels=int(state['layer1.0.conv1.weight'].size(1)),
        num_stages=stages,
        strides=(1, 2, 2, 2)[:stages],
        dilations=(1, ) * stages,
        out_indices=(stages - 1, ))
    if DEEP_STEMS[0] in state:  # other names than mmpretrain's, and the same
        cfg['type'] = f'mmseg.ResNet{version}'
    if width != per_group:
        # Its last convolution has the width that an ungrouped one would.
        expanded = state['layer1.0.conv3.weight'].size(0)
        cfg.update(
            type='ResNeXt',
            base_channels=int(expanded) // 4,
            groups=int(width // per_group),
            width_per_group=int(per_group))
    saved = _saved_model(path)
    backbone = saved.get('backbone')
    if isinstance(backbone, dict):
        cfg.update(_geometry(backbone, stages))
    return Run(cfg, _normalisation(saved))


def _geometry(saved: Mapping[str, Any], stages: int) -> Dict[str, Any]:
    """What of a saved backbone's config no tensor tells.

    Small whole numbers and one of a few words: whatever else a stranger's
    file asks for is not built.
    """
    known: Dict[str, Any] = {}
    for name in ('strides', 'dilations'):
        values = saved.get(name)
        if isinstance(values, (list, tuple)) and len(values) >= stages and all(
                type(x) is int and 1 <= x <= 32 for x in values):
            known[name] = tuple(values[:stages])
    if saved.get('style') in ('pytorch', 'caffe'):
        known['style'] = saved['style']
    if isinstance(saved.get('contract_dilation'), bool):
        known['contract_dilation'] = saved['contract_dilation']
    conv = saved.get('conv_cfg')
    if isinstance(conv, dict) and conv.get('padding_mode') in PADDING_MODES:
        known['conv_cfg'] = dict(
            type='Conv2d', padding_mode=conv['padding_mode'])
    return known


def _saved_model(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    """The model of the config inside a checkpoint of mmengine.

    The config is Python, from a file that nobody vouches for, so it is read
    as literals and never run.
    """
    path = str(path)
    if path.startswith(('http://', 'https://')):
        path = str(download(path))
    try:
        tree = load_from_local(path, 'cpu')
    except ValueError:  # safetensors, as read_backbone has read it
        return {}
    meta = tree.get('meta')
    text = meta.get('cfg') if isinstance(meta, dict) else None
    if not isinstance(text, str):
        return {}
    try:
        for line in ast.parse(text).body:
            if isinstance(line, ast.Assign) and isinstance(
                    line.targets[0],
                    ast.Name) and line.targets[0].id == 'model':
                model = _literal(line.value)
                return model if isinstance(model, dict) else {}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return {}


def _literal(node: ast.expr) -> Any:
    """Value of literals and of ``dict(...)`` of them; None for the rest."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict':
            return None
        return {x.arg: _literal(x.value) for x in node.keywords if x.arg}
    if isinstance(node, ast.Dict):
        return {
            k.value: _literal(v)
            for k, v in zip(node.keys, node.values)
            if isinstance(k, ast.Constant)
        }
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # the latter for what cannot be hashed
        return None
