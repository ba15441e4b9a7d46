# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Write a backbone for other projects.

torchvision, timm and the OpenMMLab toolboxes share one set of names.
detectron2 has its own; its layout of a file follows
detection/convert-pretrain-to-detectron2.py of facebookresearch/moco.
"""

import io
import json
import pickle
import re
from collections.abc import Collection
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mmdensecl.version import __version__

from .architecture import match_depth
from .read_backbone import Backbone, trained_geometry
from .run_info import ENTRY

TORCHVISION = re.compile(
    r'(?:layer(?P<stage>[1-4])\.(?P<block>\d+)\.)?'
    r'(?:(?P<kind>conv|bn)(?P<number>[1-3])|downsample\.(?P<part>[01]))'
    r'\.(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)'
)

# What torchvision's and detectron2's ResNets do, and no tensor shows.
PLAIN = dict(
    strides=(1, 2, 2, 2),
    dilations=(1, 1, 1, 1),
    style='pytorch',
    conv_cfg=dict(type='Conv2d', padding_mode='zeros'),
)


def to_detectron2_name(name: str) -> str:
    """Name in detectron2 of a tensor of a plain ResNet.

    'layer1.0.downsample.1.weight' is 'res2.0.shortcut.norm.weight'.

    Raises:
        ValueError: A plain ResNet has no such tensor.
    """
    found = TORCHVISION.fullmatch(name)
    if not found:
        raise ValueError(
            f'"{name}" is no tensor of a plain ResNet, which is '
            'all that the other projects can take'
        )
    stage, block, kind, number, part, tensor = found.groups()
    place = 'stem' if stage is None else f'res{int(stage) + 1}.{block}'
    conv = 'shortcut' if part else f'conv{number}'
    norm = '.norm' if kind == 'bn' or part == '1' else ''
    return f'{place}.{conv}{norm}.{tensor}'


def missing_tensors(names: Collection[str]) -> list[str]:
    """What a ResNet lacks, by the names of its tensors.

    Names that torchvision's ResNet of this depth has besides, but for
    counters of batches. Of a depth that is not known, blocks that lack all
    their tensors are missed. None for other backbones than ResNets with a
    plain or a deep stem.
    """
    plain = [x for x in names if not x.startswith('stem.')]
    bottleneck, counts, known = match_depth(names)
    if not any(counts) or not all(map(TORCHVISION.fullmatch, plain)):
        return []
    with torch.device('meta'):
        block = Bottleneck if bottleneck else BasicBlock
        resnet = ResNet(block, [*known[1]] if known else counts)
    skipped = ('fc.', 'conv1.', 'bn1.') if len(plain) < len(names) else 'fc.'
    return [
        x
        for x in resnet.state_dict()
        if x not in names
        and not x.startswith(skipped)
        and not x.endswith('num_batches_tracked')
    ]


def describe_file(backbone: Backbone) -> dict[str, object]:
    """What a published file says of itself, as plain values.

    ``arch``, ``source`` and its ``sha256``, ``versions``, and as ``run`` what
    :func:`.run_info.read_run` found, of the backbone's config only what no
    tensor shows.
    """
    run = {k: x for k, x in backbone.run.items() if k != 'backbone'}
    if geometry := trained_geometry(backbone):
        run['backbone'] = geometry
    return dict(
        arch=backbone.arch,
        source=backbone.source,
        sha256=backbone.sha256,
        versions=dict(mmdensecl=__version__, torch=str(torch.__version__)),
        run=run,
    )


def untold_settings(backbone: Backbone, to: str) -> dict[str, Any]:
    """How a network was trained that the other project would build otherwise.

    Args:
        backbone: From :func:`read_backbone`.
        to: A key of :data:`SUFFIXES`.

    Returns:
        Such as ``strides``; empty where the file says it, or nothing is known.
    """
    if to in ('openmmlab', 'safetensors'):
        return {}
    known = trained_geometry(backbone)
    return {k: known[k] for k, x in PLAIN.items() if known.get(k, x) != x}


def encode_backbone(backbone: Backbone, to: str) -> bytes:
    """Content of a file for another project.

    The same backbone always gives the same bytes.

    Args:
        backbone: From :func:`read_backbone`.
        to: A key of :data:`SUFFIXES`.

    Returns:
        A whole file.

    Raises:
        ValueError: The project has no place for some tensor, or the ResNet
            is not whole.
    """
    missing = missing_tensors(backbone.state_dict)
    if missing:
        raise ValueError(
            f'The backbone of {backbone.source} is not whole and must not be '
            f'passed on; {len(missing)} tensors are missing: '
            f'{", ".join(missing)}'
        )
    # Copies that share no memory with what else the checkpoint held.
    state = {
        k: v.detach().clone(memory_format=torch.contiguous_format)
        for k, v in backbone.state_dict.items()
    }
    entry = describe_file(backbone)
    if to == 'safetensors':
        text = json.dumps(entry, sort_keys=True, default=str)
        return _encode_safetensors(state, text)
    names = {}
    if to != 'openmmlab':  # plain ResNets only
        names = {k: to_detectron2_name(k) for k in state}
    if to == 'detectron2':
        return pickle.dumps(
            dict(
                model={names[k]: v.numpy() for k, v in state.items()},
                __author__=f'mmdensecl {__version__}',
                matching_heuristics=True,
            ),
            protocol=4,
        )
    file = io.BytesIO()
    torch.save(
        state
        if to == 'torchvision'
        else dict(state_dict=state, meta={ENTRY: entry}),
        file,
    )
    return file.getvalue()


def _encode_safetensors(state: dict[str, Tensor], entry: str) -> bytes:
    """A file whose header has its metadata in order, not in a random one."""
    data = safetensors.torch.save(state, {'format': 'pt', ENTRY: entry})
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False)
    return data[:8] + text.encode().ljust(end - 8) + data[end:]


# Projects that a backbone can be written for, and their files.
SUFFIXES = dict(
    openmmlab='.pth',
    torchvision='.pth',
    detectron2='.pkl',
    safetensors='.safetensors',
)
