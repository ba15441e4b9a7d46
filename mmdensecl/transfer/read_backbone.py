# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The backbone of a checkpoint, whoever wrote it.

Training codes differ in where they put the ResNet: under ``backbone.``,
``encoder_q.0.``, ``module.encoder_q.``, at the top, inside ``state_dict`` or
``model``. The ResNet itself has the same names everywhere. So it is searched
for by those, and the place where it is found tells who wrote the file.
"""
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdensecl.checkpoint import check_file, download, load_from_local

# Parts of a name that say how a model was wrapped or packed, not what it is:
# DDP and AveragedModel, torch.compile, FSDP, activation checkpointing, and
# the usual dictionaries around a state dict.
WRAPPERS = frozenset(
    ('module', '_orig_mod', '_fsdp_wrapped_module',
     '_checkpoint_wrapped_module', 'state_dict', 'model', 'model_state_dict'))

# Dictionaries of averaged weights beside the others; the average comes first,
# as in timm. mmengine's EMAHook does it the other way round: ``state_dict``
# is the average, ``ema_state_dict`` the rest.
AVERAGED = ('state_dict_ema', 'model_ema')

# Places of a backbone, the best first: place, names that the file then has as
# well, who writes such files.
PLACES = (
    ('encoder_q.0', '', "DenseCL authors' training checkpoint"),
    ('encoder_q', '', 'checkpoint of facebookresearch/moco'),
    ('backbone', 'encoder_k.backbone.', 'mmdensecl training checkpoint'),
    ('backbone', 'encoder_k.0.', 'mmselfsup or mmpretrain checkpoint with a '
     'momentum encoder'),
    ('backbone', 'decode_head.', 'mmseg model'),
    ('backbone', 'rpn_head.', 'mmdet model'),
    ('backbone', 'bbox_head.', 'mmdet model'),
    ('backbone', '', 'OpenMMLab model'),
    ('', 'fc.', 'torchvision or timm classifier'),
    ('', '', 'bare backbone'),
)

# Momentum copies: evaluated here and there, meant for transfer nowhere. A
# "teacher" is none of them: DINO's is what is used.
COPIES = frozenset(('encoder_k', 'target_net', 'ema_state_dict',
                    'momentum_encoder', 'momentum_backbone', 'target_encoder'))

FIRST_BLOCK = 'layer1.0.conv1.weight'
# The deep stem of V1c and V1d in mmdet and mmseg, and in mmpretrain.
DEEP_STEMS = ('stem.0.weight', 'stem.0.conv.weight')
STEMS = ('conv1.weight', *DEEP_STEMS)
FIRST_CONVOLUTIONS = re.compile(r'layer1\.0\.conv[123]\.weight')
BLOCK = re.compile(r'layer(\d+)\.(\d+)\.')
RESNET = re.compile(r'(conv1|bn1|stem|layer\d+)\.')
WEIGHT = re.compile(r'(^|\.)(weight|bias|running_mean|running_var)$')
CONVOLUTION = re.compile(r'(^|\.)conv\d\.weight$')
DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


class NoBackboneError(ValueError):
    """A file without a backbone, or with several and no word on which."""


@dataclass(frozen=True)
class Backbone:
    """A backbone as it stands in a file.

    Attributes:
        state_dict (dict[str, Tensor]): Under plain names, ``conv1.weight``,
            ``bn1.*``, ``layer1.0...``; on the CPU.
        source (str): What the file is, in words.
        prefix (str): Where in the file it was, without wrappers.
        arch (str, optional): Such as 'ResNet-50'; None for other than a
            ResNet.
        left_out (tuple[str]): What else the file holds.
        sha256 (str): Of the file.
    """
    state_dict: Dict[str, Tensor]
    source: str
    prefix: str
    arch: Optional[str]
    left_out: Tuple[str, ...]
    sha256: str


def read_backbone(path: Union[str, os.PathLike],
                  prefix: Optional[str] = None) -> Backbone:
    """Read the backbone of any known checkpoint, without running its code.

    Known are checkpoints of mmdensecl, of the DenseCL authors (training and
    released), mmselfsup, mmpretrain, mmdet, mmseg, facebookresearch/moco,
    torchvision and timm, as ``.pth`` or ``.safetensors``. Of two encoders the
    query encoder is taken. A two-stage detector of the C4 kind has its last
    stage in ``roi_head.shared_head``; it becomes part of the backbone again.

    Args:
        path (str | os.PathLike): A file, or its http(s) address.
        prefix (str, optional): Where the backbone is, such as
            'encoder_k.backbone.'. Defaults to None: found by itself.

    Returns:
        Backbone: Its tensors under plain names, and what the file is.

    Raises:
        FileNotFoundError: There is no such file.
        NoBackboneError: It holds no backbone, none under ``prefix``, only a
            momentum copy, or several of which none is known to be the one.
        UnsafeCheckpointError: Unpickling it could run code.
        ValueError: It is truncated, no checkpoint, or holds weights that are
            not finite, not floating-point numbers, or convolutions of zeros.
    """
    tree, sha256 = _load(str(path))
    if not isinstance(tree, Mapping):
        raise ValueError(f'"{path}" is no checkpoint: it holds a '
                         f'{type(tree).__name__}, not a dictionary of tensors')
    tensors = dict(_tensors(tree))
    if not tensors:
        raise NoBackboneError(f'"{path}" holds no tensors at all')
    if prefix is None:
        tensors = _unwrapped(tensors, path)
        place = _choose(tensors, path)
    else:
        tensors, place = _at(tensors, prefix, path)
    start = f'{place}.' if place else ''
    inside = _below(tensors, start)
    if FIRST_BLOCK in inside:
        state = {k: v for k, v in inside.items() if RESNET.match(k)}
        state = {**state, **_shared_head(tensors, start, state)}
    else:
        state = inside
    _check_values(state, path)
    taken = {id(x) for x in state.values()}
    return Backbone(
        state_dict=state,
        source=_source(tree, tensors, place),
        prefix=start,
        arch=describe_architecture(state),
        left_out=_groups((k for k, v in tensors.items() if id(v) not in taken),
                         start),
        sha256=sha256)


def describe_architecture(state: Mapping[str, Tensor]) -> Optional[str]:
    """Name a ResNet by its tensors.

    Args:
        state (Mapping[str, Tensor]): State dict of a backbone.

    Returns:
        str | None: Such as 'ResNet-50', 'ResNetV1c-50', 'ResNet-50 without
        layer4', 'ResNet-18 with 4 channels in layer1'; block counts for an
        unknown depth; None for other than a whole ResNet.
    """
    if (not {FIRST_BLOCK, 'layer1.0.conv2.weight'} <= state.keys()
            or not any(x in state for x in STEMS)):
        return None
    first = [x for k, x in state.items() if FIRST_CONVOLUTIONS.fullmatch(k)]
    if any(x.dim() != 4 or not x.numel() for x in first):
        return None
    width = state['layer1.0.conv2.weight'].shape[:2]
    blocks: Dict[str, set] = {}
    for found in filter(None, map(BLOCK.match, state)):
        blocks.setdefault(found[1], set()).add(found[2])
    counts: List[int] = []
    while f'layer{len(counts) + 1}.0.conv1.weight' in state:
        counts.append(len(blocks[str(len(counts) + 1)]))
    bottleneck = 'layer1.0.conv3.weight' in state
    depth = next(
        (depth for (kind, whole), depth in DEPTHS.items()
         if kind == bottleneck and whole[:len(counts)] == tuple(counts)), None)
    if depth is None:
        kind = 'bottleneck' if bottleneck else 'basic'
        return f'ResNet of {"-".join(map(str, counts))} {kind} blocks'
    # V1c and V1d have three convolutions for a stem; V1d pools before the
    # convolution of a shortcut, which moves it from place 0 to 1.
    version = ''
    if any(x in state for x in DEEP_STEMS):
        shortcut = state.get('layer2.0.downsample.1.weight')
        is_conv = shortcut is not None and shortcut.dim() == 4
        version = 'V1d' if is_conv else 'V1c'
    words = f'ResNet{version}-{depth}'
    if width != (64, 64):
        words += f' with {width[0]} channels in layer1'
        if width[0] != width[1]:
            words += f' in {width[0] // width[1]} groups'
    if len(counts) < 4:
        words += ' without ' + ', '.join(f'layer{i + 1}'
                                         for i in range(len(counts), 4))
    return words


def _load(path: str) -> Tuple[Any, str]:
    """Content and sha256 of a file."""
    if path.endswith(('.pkl', '.pickle')):
        raise ValueError(
            f'"{path}" is a bare pickle, which could run code when read. '
            'Convert it where you trust it: save its "model" as tensors with '
            'torch.save, or as .safetensors, and give that file.')
    if path.startswith(('http://', 'https://')):
        path = str(download(path))
    path = check_file(path)
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        head = file.read(9)
        digest.update(head)
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    # The length of a JSON header, then the header; zip files and pickles
    # begin otherwise.
    if not path.endswith('.safetensors') and head[8:] != b'{':
        return load_from_local(path, 'cpu'), digest.hexdigest()
    try:
        return load_file(path), digest.hexdigest()
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f'"{path}" ({os.path.getsize(path)} bytes) is truncated or not a '
            f'safetensors file: {error}') from error


def _tensors(tree: Mapping) -> Iterator[Tuple[str, Tensor]]:
    """Every tensor of nested dictionaries, by its dotted name.

    What is in there twice, or inside itself, has the first of its names.
    """
    seen = {id(tree)}
    todo = [('', iter(tree.items()))]
    while todo:
        path, items = todo[-1]
        for key, value in items:
            if not isinstance(key, str):  # numbers are the optimiser's
                continue
            if isinstance(value, Tensor):
                yield path + key, value
            elif isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                todo.append((f'{path}{key}.', iter(value.items())))
                break
        else:
            todo.pop()


def _strip(name: str) -> str:
    return '.'.join(x for x in name.split('.') if x not in WRAPPERS)


def _unwrapped(tensors: Mapping[str, Tensor], path: Any) -> Dict[str, Tensor]:
    plain: Dict[str, str] = {}
    for name in tensors:
        other = plain.setdefault(_strip(name), name)
        if other != name and FIRST_BLOCK in name:
            raise NoBackboneError(
                f'"{path}" holds two candidates for a backbone, '
                f'"{other.replace(FIRST_BLOCK, "")}" and '
                f'"{name.replace(FIRST_BLOCK, "")}". Say which by prefix=')
    return {name: tensors[raw] for name, raw in plain.items()}


def _below(tensors: Mapping[str, Tensor], start: str) -> Dict[str, Tensor]:
    return {
        k[len(start):]: v
        for k, v in tensors.items() if k.startswith(start)
    }


def _resnets(tensors: Mapping[str, Tensor]) -> List[str]:
    """Places of whole ResNets, without the dot at the end."""
    starts = [
        name[:-len(FIRST_BLOCK)] for name in tensors
        if f'.{name}'.endswith(f'.{FIRST_BLOCK}')
    ]
    return [
        start[:-1] for start in starts
        if any(start + stem in tensors for stem in STEMS)
    ]


def _quote(places: List[str]) -> str:
    return ', '.join(f'"{x}."' if x else '"" (the top)' for x in places)


def _choose(tensors: Mapping[str, Tensor], path: Any) -> str:
    """The place of the backbone."""
    found = _resnets(tensors)
    known = [
        '.'.join(filter(None, (head, place))) for head in (*AVERAGED, '')
        for place, _, _ in PLACES
    ]
    for place in known:
        if place in found:
            return place
    if not found and _below(tensors, 'backbone.'):
        return 'backbone'
    encoders = [x for x in found if COPIES.isdisjoint(x.split('.'))]
    if len(encoders) == 1:
        return encoders[0]
    if encoders:
        raise NoBackboneError(f'"{path}" holds {len(encoders)} ResNets, under '
                              f'{_quote(encoders)}. Say which one by prefix=')
    if found:
        raise NoBackboneError(
            f'The only ResNet in "{path}" is a momentum copy (key encoder), '
            f'under {_quote(found)}. Downstream models start from the query '
            f'encoder; if you do want the copy, say prefix="{found[0]}."')
    raise NoBackboneError(
        f'"{path}" holds no ResNet and nothing under "backbone.", only '
        f'{_listed(tensors)}. A backbone of another kind is found by prefix=')


def _at(tensors: Mapping[str, Tensor], prefix: str,
        path: Any) -> Tuple[Dict[str, Tensor], str]:
    """The tensors and the place for a prefix that the user gave."""
    place = prefix.strip('.')
    start = f'{place}.' if place else ''
    if start and any(name.startswith(start) for name in tensors):
        # As it stands in the file, wrappers and all.
        raw = _unwrapped(_below(tensors, start), path)
        tensors = {f'{start}{k}': v for k, v in raw.items()}
    else:
        tensors = _unwrapped(tensors, path)
        place = _strip(place)
        start = f'{place}.' if place else ''
    inside = _below(tensors, start)
    if not inside:
        raise NoBackboneError(
            f'"{path}" has no tensors under prefix="{prefix}", only '
            f'{_listed(tensors)}')
    deeper = _resnets(inside)
    if deeper and '' not in deeper:
        raise NoBackboneError(
            f'"{path}" has its ResNet not under prefix="{prefix}" itself but '
            f'under {_quote([start + x for x in deeper])}')
    return tensors, place


def _shared_head(tensors: Mapping[str, Tensor], start: str,
                 state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The last stage of a C4 detector, which sits in its RoI head."""
    if not start.endswith('backbone.') or 'layer4.0.conv1.weight' in state:
        return {}
    head = f'{start[:-len("backbone.")]}roi_head.shared_head.'
    return {
        k: v
        for k, v in _below(tensors, head).items() if k.startswith('layer4.')
    }


def _source(tree: Mapping, tensors: Mapping[str, Tensor], place: str) -> str:
    averaged = place.split('.')[0] in AVERAGED
    if averaged:
        place = place.partition('.')[2]
    if not place and tree.get('author') == 'DenseCL':
        words = "DenseCL authors' released weights"
    else:
        words = next(
            (words for known, also, words in PLACES
             if known == place and any(x.startswith(also) for x in tensors)),
            f'unknown checkpoint with a backbone under "{place}."')
    return words + (', averaged (EMA) weights' if averaged else '')


def _groups(names: Iterator[str], start: str) -> Tuple[str, ...]:
    """What names begin with, down to where they leave ``start``."""
    groups = {}
    for name in names:
        parts, depth = name.split('.'), 1
        while (depth < len(parts)
               and start.startswith('.'.join(parts[:depth]) + '.')):
            depth += 1
        groups['.'.join(parts[:depth])] = None
    return tuple(groups)


def _listed(tensors: Mapping[str, Tensor], most: int = 8) -> str:
    groups = _groups(iter(tensors), '')
    more = f' and {len(groups) - most} more' if len(groups) > most else ''
    return ', '.join(groups[:most]) + more


def _is_float(x: Tensor) -> bool:
    """Whether torch computes with it; not with numbers of a byte."""
    return x.is_floating_point() and x.element_size() > 1


def _check_values(state: Mapping[str, Tensor], path: Any) -> None:
    """Refuse what no network of use consists of."""
    problems = (
        ('hold NaN or infinity',
         lambda name, x: _is_float(x) and not x.isfinite().all(),
         'The run that wrote it had diverged; take an earlier checkpoint.'),
        # Other integers are indices and counters.
        ('are no floating-point numbers of 16 bits or more',
         lambda name, x: not _is_float(x) and
         (x.is_floating_point() or WEIGHT.search(name)),
         'Quantised weights cannot be trained; take those that they are of.'),
        ('hold only zeros',
         lambda name, x: CONVOLUTION.search(name) and not x.any(),
         'No training ends so; the file is not what it was meant to be.'),
    )
    for what, is_bad, then in problems:
        bad = [name for name, x in state.items() if is_bad(name, x)]
        if bad:
            raise ValueError(
                f'{len(bad)} of {len(state)} backbone tensors of "{path}" '
                f'{what}: {", ".join(bad[:5])}'
                f'{", ..." if len(bad) > 5 else ""}. {then}')
