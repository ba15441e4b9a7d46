# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The architecture of a backbone, inferred from its tensors."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

FIRST_BLOCK = 'layer1.0.conv1.weight'
# The deep stem of V1c and V1d in mmdet and mmseg, and in mmpretrain.
DEEP_STEMS = ('stem.0.weight', 'stem.0.conv.weight')
STEMS = ('conv1.weight', *DEEP_STEMS)
FIRST_CONVOLUTIONS = re.compile(r'layer1\.0\.conv[123]\.weight')
BLOCK = re.compile(r'layer(\d+)\.(\d+)\.')
# HRNet begins as a ResNet does, and goes on with these.
OTHER_STAGE = re.compile(r'(stage|transition)\d+\.')
HRNET_BRANCH = 'stage2.0.branches.0.0.conv1.weight'
DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')  # of Conv2d


def is_resnet(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a ResNet, maybe not a whole one."""
    return FIRST_BLOCK in state and not any(map(OTHER_STAGE.match, state))


def match_depth(
    names: Collection[str],
) -> tuple[bool, list[int], tuple[int, tuple[int, ...]] | None]:
    """The depth of a ResNet by the names of its tensors.

    Returns:
        Whether it has bottlenecks; the blocks of its four stages; and, if
        there is a ResNet with these stages and perhaps others, its depth and
        its blocks.
    """
    blocks = {found.groups() for found in map(BLOCK.match, names) if found}
    stages = Counter(stage for stage, _ in blocks)
    counts = [stages[str(i)] for i in range(1, 5)]
    bottleneck = any('.conv3.' in x for x in names)
    for (kind, whole), depth in DEPTHS.items():
        fits = all(a in (0, b) for a, b in zip(counts, whole, strict=True))
        if kind == bottleneck and fits:
            return bottleneck, counts, (depth, whole)
    return bottleneck, counts, None


def describe_architecture(state: Mapping[str, Tensor]) -> str | None:
    """Name a ResNet or HRNet by its tensors.

    Args:
        state: State dict of a backbone.

    Returns:
        Such as 'ResNet-50', 'ResNetV1c-50', 'ResNet-50 without layer4',
        'ResNet-18 with 4 channels in layer1', 'HRNet-w18'; block counts for
        an unknown depth; None for anything else.
    """
    if not {FIRST_BLOCK, 'layer1.0.conv2.weight'} <= state.keys() or not any(
        x in state for x in STEMS
    ):
        return None
    if not is_resnet(state):
        branch = state.get(HRNET_BRANCH)
        return None if branch is None else f'HRNet-w{len(branch)}'
    first = [x for k, x in state.items() if FIRST_CONVOLUTIONS.fullmatch(k)]
    if any(x.dim() != 4 or not x.numel() for x in first):
        return None
    bottleneck, counts, known = match_depth(state)
    if not known:
        kind = 'bottleneck' if bottleneck else 'basic'
        return f'ResNet of {"-".join(map(str, counts))} {kind} blocks'
    version = ''
    if any(x in state for x in DEEP_STEMS):
        # V1d pools before the convolution of a shortcut, which moves it from
        # index 0 to 1.
        shortcut = state.get('layer2.0.downsample.1.weight')
        is_v1d = shortcut is not None and shortcut.dim() == 4
        version = 'V1d' if is_v1d else 'V1c'
    squeeze = 'SE' if any('.se_layer.' in x for x in state) else ''
    words = f'{squeeze}ResNet{version}-{known[0]}'
    width, per_group = state['layer1.0.conv2.weight'].shape[:2]
    if (width, per_group) != (64, 64):
        words += f' with {width} channels in layer1'
        if width != per_group:
            words += f' in {width // per_group} groups'
    lacks = [f'layer{i}' for i, count in enumerate(counts, 1) if not count]
    return words + (f' without {", ".join(lacks)}' if lacks else '')


def name_in_twin(name: str, own: Collection[str]) -> str:
    """Name of a tensor in the other toolboxes' version of a network.

    Deep stems are lists of ConvModules in mmpretrain, and flat in mmdet and
    mmseg; MobileNet's blocks are lists, and have names in mmdet.

    Args:
        name: Of a tensor of the module.
        own: All names of the module.
    """
    stem = re.fullmatch(r'stem\.(\d)\.(?:(conv|bn)\.)?(\w+)', name)
    if stem and stem[2]:
        return f'stem.{3 * int(stem[1]) + (stem[2] == "bn")}.{stem[3]}'
    if stem:
        number, is_norm = divmod(int(stem[1]), 3)
        return f'stem.{number}.{"bn" if is_norm else "conv"}.{stem[3]}'
    part = re.fullmatch(
        r'(layer\d+\.\d+)\.(expand|depthwise|linear)_conv\.(.+)', name
    )
    if part:
        place = ('expand', 'depthwise', 'linear').index(part[2])
        place -= f'{part[1]}.expand_conv.conv.weight' not in own
        return f'{part[1]}.conv.{place}.{part[3]}'
    return name


def infer_config(
    state: Mapping[str, Tensor], arch: str | None, saved: Any = None
) -> dict[str, Any]:
    """Config of the backbone that has these tensors.

    Args:
        state: Its state dict.
        arch: From :func:`describe_architecture`.
        saved: Config of the backbone as the file has it, untrusted. What no
            tensor shows, such as strides, is taken from it, else as usual.

    Returns:
        In mmpretrain's scope.

    Raises:
        ValueError: It cannot be inferred, or the ResNet is not whole.
    """
    hrnet = re.fullmatch(r'HRNet-(w\d+)', arch or '')
    if hrnet:
        return dict(type='HRNet', arch=hrnet[1])
    known = re.match(r'ResNet(V1[cd]|)-(\d+)', arch or '')
    if not known:
        raise ValueError(f'tensors alone do not tell what {arch} is')
    version, depth = known[1], int(known[2])
    stages = sum(f'layer{i}.0.conv1.weight' in state for i in range(1, 5))
    width, per_group = state['layer1.0.conv2.weight'].shape[:2]
    # Or a small file might ask for a network that fits no memory.
    for i in range(stages):
        name = f'layer{i + 1}.0.conv2.weight'
        got = tuple(state[name].shape) if name in state else 'none'
        expected = (width << i, per_group << i, 3, 3)
        if got != expected:
            raise ValueError(f'{name} is {got}, expected {expected}')
    cfg = dict(
        type=f'ResNet{version}',
        depth=depth,
        base_channels=int(width),
        stem_channels=int(state[FIRST_BLOCK].size(1)),
        num_stages=stages,
        strides=(1, 2, 2, 2)[:stages],
        dilations=(1,) * stages,
        out_indices=(stages - 1,),
    )
    if DEEP_STEMS[0] in state:  # other names than mmpretrain's, and the same
        cfg['type'] = f'mmseg.ResNet{version}'
    if width != per_group:
        # Its last convolution has the width that an ungrouped one would.
        expanded = state['layer1.0.conv3.weight'].size(0)
        cfg.update(
            type='ResNeXt',
            base_channels=int(expanded) // 4,
            groups=int(width // per_group),
            width_per_group=int(per_group),
        )
    if isinstance(saved, Mapping):
        cfg.update(saved_geometry(saved, stages))
    return cfg


def saved_geometry(
    saved: Mapping[str, Any], stages: int = 4
) -> dict[str, Any]:
    """Take from an untrusted config what no tensor of a ResNet shows.

    Only small integers and known words: nothing else that it asks for is
    built.

    Args:
        saved: Config of the backbone.
        stages: How many it has.
    """
    known: dict[str, Any] = {}
    for name in ('strides', 'dilations'):
        values = saved.get(name)
        if (
            isinstance(values, list | tuple)
            and len(values) >= stages
            and all(type(x) is int and 1 <= x <= 32 for x in values)
        ):
            known[name] = tuple(values[:stages])
    if saved.get('style') in ('pytorch', 'caffe'):
        known['style'] = saved['style']
    if isinstance(saved.get('contract_dilation'), bool):
        known['contract_dilation'] = saved['contract_dilation']
    conv = saved.get('conv_cfg')
    if isinstance(conv, Mapping) and conv.get('padding_mode') in PADDING_MODES:
        known['conv_cfg'] = dict(
            type='Conv2d', padding_mode=conv['padding_mode']
        )
    return known
