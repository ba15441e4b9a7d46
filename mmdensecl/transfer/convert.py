# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A ResNet backbone under the names of other projects.

torchvision, timm and the OpenMMLab toolboxes share one set of names.
detectron2 has its own; its layout of a file follows
detection/convert-pretrain-to-detectron2.py of facebookresearch/moco.
"""
import io
import pickle
import re
from typing import Dict, Iterable, List, Mapping

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mmdensecl.version import __version__
from .read_backbone import DEPTHS, Backbone

TORCHVISION = re.compile(
    r'(?:layer(?P<stage>[1-4])\.(?P<block>\d+)\.)?'
    r'(?:(?P<kind>conv|bn)(?P<number>[1-3])|downsample\.(?P<part>[01]))'
    r'\.(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)')
DETECTRON2 = re.compile(
    r'(?:stem|res(?P<stage>[2-5])\.(?P<block>\d+))\.'
    r'(?:conv(?P<number>[1-3])|shortcut)(?P<norm>\.norm)?'
    r'\.(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)')


def to_detectron2_name(name: str) -> str:
    """Name in detectron2 of a tensor of a plain ResNet.

    Args:
        name (str): Such as 'layer1.0.downsample.1.weight'.

    Returns:
        str: Such as 'res2.0.shortcut.norm.weight'.

    Raises:
        ValueError: A plain ResNet has no such tensor.
    """
    found = TORCHVISION.fullmatch(name)
    if not found:
        raise ValueError(f'"{name}" is no tensor of a plain ResNet, which is '
                         'all that the other projects can take')
    stage, block, kind, number, part, tensor = found.groups()
    place = 'stem' if stage is None else f'res{int(stage) + 1}.{block}'
    conv = 'shortcut' if part else f'conv{number}'
    norm = '.norm' if kind == 'bn' or part == '1' else ''
    return f'{place}.{conv}{norm}.{tensor}'


def from_detectron2_name(name: str) -> str:
    """Inverse of :func:`to_detectron2_name`.

    Args:
        name (str): Such as 'res2.0.shortcut.norm.weight'.

    Returns:
        str: Such as 'layer1.0.downsample.1.weight'.

    Raises:
        ValueError: It is no name of a ResNet in detectron2.
    """
    found = DETECTRON2.fullmatch(name)
    if not found:
        raise ValueError(f'"{name}" is no tensor of a ResNet in detectron2')
    stage, block, number, norm, tensor = found.groups()
    place = '' if stage is None else f'layer{int(stage) - 1}.{block}.'
    if number:
        part = f'bn{number}' if norm else f'conv{number}'
    else:
        part = 'downsample.1' if norm else 'downsample.0'
    return f'{place}{part}.{tensor}'


def to_detectron2(state: Mapping[str, Tensor]) -> Dict[str, np.ndarray]:
    """Arrays of a plain ResNet under detectron2's names.

    Args:
        state (Mapping[str, Tensor]): Under plain names.

    Returns:
        dict[str, np.ndarray]: The same numbers.
    """
    return {to_detectron2_name(k): v.numpy() for k, v in state.items()}


def from_detectron2(arrays: Mapping[str, np.ndarray]) -> Dict[str, Tensor]:
    """Inverse of :func:`to_detectron2`.

    Args:
        arrays (Mapping[str, np.ndarray]): Under detectron2's names.

    Returns:
        dict[str, Tensor]: Under plain names.
    """
    return {
        from_detectron2_name(k): torch.from_numpy(np.array(v))
        for k, v in arrays.items()
    }


def to_torchvision(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """A plain ResNet for torchvision and timm, which have no deep stem there.

    Args:
        state (Mapping[str, Tensor]): Under plain names.

    Returns:
        dict[str, Tensor]: The same; a classifier's ``fc`` is not in it.

    Raises:
        ValueError: A plain ResNet has no such tensor.
    """
    for name in state:
        to_detectron2_name(name)
    return dict(state)


def missing_tensors(names: Iterable[str]) -> List[str]:
    """What a ResNet lacks.

    Args:
        names (Iterable[str]): Of its tensors, under plain names.

    Returns:
        list[str]: Names that torchvision's ResNet of this depth has besides,
        but for counters of batches. Of a depth that is not known, blocks in
        between are missed, but not the last of a stage. Empty for other
        backbones than ResNets with a plain or a deep stem.
    """
    names = set(names)
    stem = {x for x in names if x.startswith('stem.')}
    found = [TORCHVISION.fullmatch(x) for x in names - stem]
    if not all(found):
        return []
    counts = [0] * 4
    for stage, block in (x.group('stage', 'block') for x in found):
        if stage:
            stage = int(stage) - 1
            counts[stage] = max(counts[stage], int(block) + 1)
    if not any(counts):
        return []
    is_bottleneck = any('.conv3.' in x for x in names)
    whole = next((whole
                  for kind, whole in DEPTHS if kind == is_bottleneck and all(
                      a in (0, b) for a, b in zip(counts, whole))), counts)
    with torch.device('meta'):
        resnet = ResNet(Bottleneck if is_bottleneck else BasicBlock, whole)
    other_stem = ('conv1.', 'bn1.') if stem else ()
    return [
        x for x in resnet.state_dict() if x not in names and not x.startswith(
            ('fc.', *other_stem)) and not x.endswith('num_batches_tracked')
    ]


def encode_backbone(backbone: Backbone, to: str) -> bytes:
    """Content of a file for another project.

    The same backbone always gives the same bytes.

    Args:
        backbone (Backbone): From :func:`read_backbone`.
        to (str): A key of :data:`SUFFIXES`.

    Returns:
        bytes: A whole file.

    Raises:
        ValueError: The project has no place for some tensor, or the ResNet
            is not whole.
    """
    missing = missing_tensors(backbone.state_dict)
    if missing:
        raise ValueError(
            f'The backbone of {backbone.source} is not whole and must not be '
            f'passed on; {len(missing)} tensors are missing: '
            f'{", ".join(missing)}')
    # Copies that share no memory with what else the checkpoint held.
    state = {
        k: v.detach().clone(memory_format=torch.contiguous_format)
        for k, v in backbone.state_dict.items()
    }
    if to == 'detectron2':
        return pickle.dumps(
            dict(
                model=to_detectron2(state),
                __author__=f'mmdensecl {__version__}',
                matching_heuristics=True),
            protocol=4)
    if to == 'safetensors':
        # More entries would stand in the file in a random order.
        return safetensors.torch.save(state, dict(format='pt'))
    meta = dict(
        mmdensecl_version=__version__,
        arch=backbone.arch,
        source=backbone.source)
    content = {
        'openmmlab': lambda: dict(state_dict=state, meta=meta),
        'torchvision': lambda: to_torchvision(state),
    }[to]()
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# Projects that a backbone can be written for, and their files.
SUFFIXES = dict(
    openmmlab='.pth',
    torchvision='.pth',
    detectron2='.pkl',
    safetensors='.safetensors')
