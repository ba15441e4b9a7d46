# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Read the backbone of a checkpoint, whoever wrote it.

Training codes differ in where they put the ResNet: under ``backbone.``,
``encoder_q.0.``, ``module.encoder_q.``, at the top, inside ``state_dict`` or
``model``. The ResNet itself has the same names everywhere, so it is found by
those, and its prefix tells who wrote the file.
"""

import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdensecl.checkpoint import check_file, download, load_from_local

from .architecture import (
    FIRST_BLOCK,
    STEMS,
    describe_architecture,
    infer_config,
    is_resnet,
    saved_geometry,
)
from .run_info import decode_run, is_published, read_run

# Parts of a name that say how a model was wrapped or packed, not what it is:
# DDP and AveragedModel, torch.compile, FSDP, activation checkpointing, and
# the usual dictionaries around a state dict.
WRAPPERS = frozenset(
    (
        'module',
        '_orig_mod',
        '_fsdp_wrapped_module',
        '_checkpoint_wrapped_module',
        'state_dict',
        'model',
        'model_state_dict',
    )
)

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
    (
        'backbone',
        'encoder_k.0.',
        'mmselfsup or mmpretrain checkpoint with a momentum encoder',
    ),
    ('backbone', 'decode_head.', 'mmseg model'),
    ('backbone', 'rpn_head.', 'mmdet model'),
    ('backbone', 'bbox_head.', 'mmdet model'),
    ('backbone', '', 'OpenMMLab model'),
    ('', 'fc.', 'torchvision or timm classifier'),
    ('', '', 'bare backbone'),
)

# Momentum copies: evaluated here and there, meant for transfer nowhere. A
# "teacher" is none of them: DINO's is what is used.
COPIES = frozenset(
    (
        'encoder_k',
        'target_net',
        'ema_state_dict',
        'momentum_encoder',
        'momentum_backbone',
        'target_encoder',
    )
)

RESNET = re.compile(r'(conv1|bn1|stem|layer\d+)\.')
WEIGHT = re.compile(r'(^|\.)(weight|bias|running_mean|running_var)$')
CONVOLUTION = re.compile(r'(^|\.)conv\d\.weight$')


class NoBackboneError(ValueError):
    """A file without a backbone, or with several and no word on which."""


@dataclass(frozen=True)
class Backbone:
    """A backbone as it stands in a file.

    Attributes:
        state_dict: Under plain names, ``conv1.weight``, ``layer1.0...``; on
            the CPU.
        source: What the file is, in words.
        prefix: Where in the file it was, without wrappers.
        arch: Such as 'ResNet-50'; None for one that is not known.
        left_out: What else the file holds.
        sha256: Hash of the file.
        run: From :func:`.run_info.read_run`; untrusted.
    """

    state_dict: dict[str, Tensor]
    source: str
    prefix: str
    arch: str | None
    left_out: tuple[str, ...]
    sha256: str
    run: dict[str, Any]


def trained_geometry(backbone: Backbone) -> dict[str, Any]:
    """Strides and the like that a ResNet was trained with, if it is known."""
    saved = backbone.run.get('backbone')
    if saved is None and 'method' not in backbone.run:
        return {}
    try:
        cfg = infer_config(backbone.state_dict, backbone.arch, saved)
    except ValueError:
        return {}
    return saved_geometry(cfg, cfg.get('num_stages', 0))


def read_backbone(
    path: str | os.PathLike, prefix: str | None = None
) -> Backbone:
    """Read the backbone of any known checkpoint, without running its code.

    Known are checkpoints of mmdensecl, of the DenseCL authors (training and
    released), mmselfsup, mmpretrain, mmdet, mmseg, facebookresearch/moco,
    torchvision and timm, as ``.pth`` or ``.safetensors``. Of two encoders the
    query encoder is taken. A two-stage detector of the C4 kind has its last
    stage in ``roi_head.shared_head``; it becomes part of the backbone again.

    Args:
        path: A file, or its http(s) address.
        prefix: Where the backbone is, such as 'encoder_k.backbone.'; None
            finds it.

    Returns:
        Its tensors under plain names, and what the file is.

    Raises:
        FileNotFoundError: There is no such file.
        NoBackboneError: It holds no backbone, none under ``prefix``, only a
            momentum copy, or several of which none is known to be the one.
        UnsafeCheckpointError: Unpickling it could run code.
        ValueError: It is truncated, no checkpoint, or holds weights that are
            not finite floating-point tensors, or convolutions of zeros.
    """
    tree, sha256 = _load(str(path))
    if not isinstance(tree, Mapping):
        kind = type(tree).__name__
        raise ValueError(
            f'"{path}" is no checkpoint: it holds a {kind}, not a dictionary '
            'of tensors'
        )
    # What stands in place of a weight counts too, such as a text.
    tensors = {
        k: x
        for k, x in _leaves(tree)
        if isinstance(x, Tensor) or WEIGHT.search(k)
    }
    if not any(isinstance(x, Tensor) for x in tensors.values()):
        raise NoBackboneError(f'"{path}" holds no tensors at all')
    if prefix is None:
        tensors = _unwrapped(tensors, path)
        place = '' if is_published(tree) else _choose(tensors, path)
    else:
        tensors, place = _at(tensors, prefix, path)
    start = f'{place}.' if place else ''
    state = _below(tensors, start)
    if is_resnet(state):
        state = {k: x for k, x in state.items() if RESNET.match(k)}
        state |= _shared_head(tensors, start, state)
    _check(state, path)
    taken = {id(x) for x in state.values()}
    rest = [k for k, x in tensors.items() if id(x) not in taken]
    return Backbone(
        state_dict=state,
        source=_source(tree, tensors, place),
        prefix=start,
        arch=describe_architecture(state),
        left_out=_groups(rest, start),
        sha256=sha256,
        run=read_run(tree),
    )


def _load(path: str) -> tuple[Any, str]:
    """Content and sha256 of a file."""
    if path.endswith(('.pkl', '.pickle')):
        raise ValueError(
            f'"{path}" is a bare pickle, which could run code when read. '
            'Convert it where you trust it: save its "model" as tensors with '
            'torch.save, or as .safetensors, and give that file.'
        )
    if path.startswith(('http://', 'https://')):
        path = str(download(path))
    path = check_file(path)
    with open(path, 'rb') as file:
        # The length of a JSON header, then the header; zip files and pickles
        # begin otherwise.
        is_safetensors = file.read(9)[8:] == b'{'
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if not path.endswith('.safetensors') and not is_safetensors:
        return load_from_local(path, 'cpu'), digest.hexdigest()
    try:
        with safe_open(path, framework='pt') as content:
            names = content.keys()
            tree = {name: content.get_tensor(name) for name in names}
            header = content.metadata()
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f'"{path}" ({os.path.getsize(path)} bytes) is truncated or not a '
            f'safetensors file: {error}'
        ) from error
    return {**tree, **decode_run(header)}, digest.hexdigest()


def _leaves(tree: Mapping) -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by its dotted name.

    A dictionary that is in there twice has the first of its names.
    """
    seen, todo = {id(tree)}, deque([('', tree)])
    while todo:
        path, node = todo.popleft()
        for key, value in node.items():
            if not isinstance(key, str):  # numbers are the optimiser's
                continue
            if not isinstance(value, Mapping):
                yield path + key, value
            elif id(value) not in seen:
                seen.add(id(value))
                todo.append((f'{path}{key}.', value))


def _strip(name: str) -> str:
    return '.'.join(x for x in name.split('.') if x not in WRAPPERS)


def _unwrapped(tensors: Mapping[str, Tensor], path: Any) -> dict[str, Tensor]:
    plain: dict[str, str] = {}
    for name in tensors:
        other = plain.setdefault(_strip(name), name)
        if other != name and FIRST_BLOCK in name:
            raise NoBackboneError(
                f'"{path}" holds two candidates for a backbone, '
                f'"{other.replace(FIRST_BLOCK, "")}" and '
                f'"{name.replace(FIRST_BLOCK, "")}". Say which by prefix='
            )
    return {name: tensors[raw] for name, raw in plain.items()}


def _below(tensors: Mapping[str, Any], start: str) -> dict[str, Any]:
    found = (k for k in tensors if k.startswith(start))
    return {k[len(start) :]: tensors[k] for k in found}


def _resnets(tensors: Mapping[str, Tensor]) -> list[str]:
    """Places of whole ResNets, without the dot at the end."""
    starts = [
        name[: -len(FIRST_BLOCK)]
        for name in tensors
        if f'.{name}'.endswith(f'.{FIRST_BLOCK}')
    ]
    return [x[:-1] for x in starts if any(x + y in tensors for y in STEMS)]


def _quote(places: list[str]) -> str:
    return ', '.join(f'"{x}."' if x else '"" (the top)' for x in places)


def _choose(tensors: Mapping[str, Tensor], path: Any) -> str:
    """The place of the backbone."""
    found = _resnets(tensors)
    for head in (*(f'{x}.' for x in AVERAGED), ''):
        for place, _, _ in PLACES:
            if f'{head}{place}'.strip('.') in found:
                return f'{head}{place}'.strip('.')
    if not found and _below(tensors, 'backbone.'):
        timm = 'backbone.timm_model'
        return timm if _below(tensors, f'{timm}.') else 'backbone'
    encoders = [x for x in found if COPIES.isdisjoint(x.split('.'))]
    if len(encoders) == 1:
        return encoders[0]
    if encoders:
        raise NoBackboneError(
            f'"{path}" holds {len(encoders)} ResNets, under '
            f'{_quote(encoders)}. Say which one by prefix='
        )
    if found:
        raise NoBackboneError(
            f'The only ResNet in "{path}" is a momentum copy (key encoder), '
            f'under {_quote(found)}. Downstream models start from the query '
            f'encoder; if you do want the copy, say prefix="{found[0]}."'
        )
    raise NoBackboneError(
        f'"{path}" holds no ResNet and nothing under "backbone.", only '
        f'{first_few(_groups(tensors))}. A backbone of another kind is found '
        'by prefix='
    )


def _at(
    tensors: Mapping[str, Tensor], prefix: str, path: Any
) -> tuple[dict[str, Tensor], str]:
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
            f'{first_few(_groups(tensors))}'
        )
    deeper = _resnets(inside)
    if deeper and '' not in deeper:
        raise NoBackboneError(
            f'"{path}" has its ResNet not under prefix="{prefix}" itself but '
            f'under {_quote([start + x for x in deeper])}'
        )
    return tensors, place


def _shared_head(
    tensors: Mapping[str, Tensor], start: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The last stage of a C4 detector, which sits in its RoI head."""
    if not start.endswith('backbone.') or 'layer4.0.conv1.weight' in state:
        return {}
    head = f'{start[: -len("backbone.")]}roi_head.shared_head.'
    found = _below(tensors, f'{head}layer4.')
    return {f'layer4.{k}': x for k, x in found.items()}


def _source(tree: Mapping, tensors: Mapping[str, Tensor], place: str) -> str:
    head, _, rest = place.partition('.')
    if head in AVERAGED:
        return f'{_source(tree, tensors, rest)}, averaged (EMA) weights'
    if not place and tree.get('author') == 'DenseCL':
        return "DenseCL authors' released weights"
    for known, also, words in PLACES:
        if known == place and any(x.startswith(also) for x in tensors):
            return words
    what = 'unknown checkpoint with a backbone'
    if not COPIES.isdisjoint(place.split('.')):
        what = 'momentum copy (key encoder)'
    return f'{what} under "{place}."'


def _groups(names: Iterable[str], start: str = '') -> tuple[str, ...]:
    """What names begin with, down to where they leave ``start``."""
    groups: dict[str, None] = {}
    for name in names:
        group, _, rest = name.partition('.')
        while rest and start.startswith(f'{group}.'):
            part, _, rest = rest.partition('.')
            group = f'{group}.{part}'
        groups[group] = None
    return tuple(groups)


def first_few(names: Sequence[str], most: int = 8) -> str:
    """Names for a message."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more


def _problem(name: str, x: Any) -> str:
    """What keeps a tensor from being of use; empty if nothing does."""
    if not isinstance(x, Tensor):
        return 'are no tensors'
    if x.is_meta or x.is_quantized or x.layout != torch.strided:
        return 'are sparse, quantised or without data'
    if not x.is_floating_point() or x.element_size() == 1:
        # Other integers are indices and counters.
        if x.is_floating_point() or WEIGHT.search(name):
            return 'are no floating-point numbers of 16 bits or more'
    elif not x.isfinite().all():
        return 'hold NaN or infinity (take a checkpoint of before that)'
    if CONVOLUTION.search(name) and not x.any():
        return 'hold only zeros'
    return ''


def _check(state: Mapping[str, Any], path: Any) -> None:
    """Refuse what no network of use consists of."""
    problems = {name: _problem(name, x) for name, x in state.items()}
    for what in filter(None, problems.values()):
        bad = [name for name, x in problems.items() if x == what]
        raise ValueError(
            f'{len(bad)} of {len(state)} backbone tensors of "{path}" {what}: '
            f'{first_few(bad)}'
        )
