# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Initialise a backbone of any host from any checkpoint, in one line."""

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from operator import mul
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel, update_init_info
from torch import Tensor

from mmdensecl.registry import WEIGHT_INITIALIZERS

from .architecture import describe_architecture, name_in_twin, saved_geometry
from .read_backbone import (
    Backbone,
    first_few,
    read_backbone,
    trained_geometry,
)
from .run_info import are_rgb

# Batch norm counts its batches in it, for a momentum of None; older files
# do not have it.
COUNTER = 'num_batches_tracked'

# Entry of mmengine's message hub, which goes into a run's checkpoints: the
# files that were loaded, by their sha256.
LOADED = 'mmdensecl_pretrained'

# Attributes in which data preprocessors keep bgr_to_rgb: mmengine's and
# mmdet's, mmseg's, mmpretrain's.
CONVERSIONS = ('_channel_conversion', 'channel_conversion', 'to_rgb')


@WEIGHT_INITIALIZERS.register_module()
class PretrainedBackbone:
    """Initialise a backbone from a checkpoint, or say why it cannot be.

    One line in the config of any mmdet, mmseg or mmpretrain model::

        backbone=dict(init_cfg=dict(
            type='mmdensecl.PretrainedBackbone', checkpoint='epoch_200.pth'))

    The file may have any format of :func:`read_backbone`. Each parameter and
    buffer of the module must be in the file with the same shape and kind of
    number, or none is loaded and the error names those that would stay
    random. It also fits ``roi_head.shared_head`` of a C4 detector, which gets
    ``layer4``.

    Args:
        checkpoint: A file or an http(s) address.
        prefix: Where in the file the backbone is; None finds it.
        allow_random: Tensors that may keep their own initialisation because
            no pre-training has them: names, parts of names or fnmatch
            patterns, such as 'conv_offset' of deformable convolutions. Each
            must match a tensor of the module.
        strict: Whether to raise if anything does not fit. If False, it loads
            what fits and warns of the rest.
        sha256: Hash of the file in hexadecimal, or its first digits, at least
            8; another file is refused. None accepts any.

    Raises:
        ValueError: No ``checkpoint`` is named, or ``sha256`` is none.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        allow_random: str | Sequence[str] = (),
        strict: bool = True,
        sha256: str | None = None,
    ) -> None:
        if not checkpoint:
            raise ValueError(
                f'PretrainedBackbone needs a checkpoint, got {checkpoint!r}. '
                'Name it by init_cfg.checkpoint in the config, or on the '
                "command line by --pretrained FILE ('none' for random "
                'weights)'
            )
        if sha256 is not None and not (
            isinstance(sha256, str)
            and re.fullmatch('[0-9a-fA-F]{8,64}', sha256)
        ):
            raise ValueError(
                f'sha256 must be 8 to 64 hexadecimal digits in a '
                f'string, got {sha256!r}'
            )
        self.checkpoint = os.fspath(checkpoint)
        self.sha256 = sha256
        self.prefix = prefix
        self.strict = strict
        names = allow_random
        self.allow_random = [names] if isinstance(names, str) else [*names]

    def __call__(self, module: nn.Module) -> None:
        """Read the file and :meth:`load` it into a module, in place."""
        self._check_last(module)
        self.load(module, read_backbone(self.checkpoint, self.prefix))

    def load(
        self,
        module: nn.Module,
        backbone: Backbone,
        images: Mapping[str, Any] | None = None,
    ) -> None:
        """Load what was read into a module, in place.

        Args:
            module: A backbone, or a part of one with the same names.
            backbone: Content of the file.
            images: ``mean`` and ``std`` by which the module's RGB images will
                be normalised; None takes those of the model around it.

        Raises:
            ValueError: Something does not fit, it is another file than
                ``sha256`` says, or what stays random is frozen.
        """
        if self.sha256 and not backbone.sha256.startswith(self.sha256.lower()):
            raise ValueError(
                f'"{self.checkpoint}" is another file than expected: got '
                f'sha256 {backbone.sha256}, expected {self.sha256}'
            )
        # mmpretrain's and mmseg's wrapper of timm's models.
        module = getattr(module, 'timm_model', module)
        state = module.state_dict()
        own = {k: x for k, x in state.items() if isinstance(x, Tensor)}
        twins = {name_in_twin(k, own): k for k in own}
        given = {
            k if k in own else twins.get(k, k): x
            for k, x in backbone.state_dict.items()
        }
        fits = {
            name: given[name]
            for name in own.keys() & given.keys()
            if not mismatch(given[name], own[name])
        }
        problems, notes = self._compare(module, own, given, fits)
        if not fits or (problems and self.strict):
            what = f'does not fit the {type(module).__name__} of the model'
            lines = [f'{self._file(backbone)}, {what}', *problems]
            raise ValueError('\n'.join(lines + _hints(own, backbone)))
        self._initialise_children(module)
        module.load_state_dict(fits, strict=False)
        self._finalize(module, backbone)
        notes['in the file but not needed'] += backbone.left_out
        head = (
            f'loaded {len(fits)}/{len(own)} tensors of '
            f'{backbone.arch or "a backbone"} into {type(module).__name__} '
            f'from {self._file(backbone)}'
        )
        self._report(module, backbone, '; '.join([head, *_listed(notes)]))
        images = _images_of(module) if images is None else images
        for difference in _differences(module, backbone, images):
            _warn(f'{self._file(backbone)}: {difference}')
        if problems:
            _warn('\n'.join([f'strict=False: {head}', *problems]))

    def _check_last(self, module: nn.Module) -> None:
        """Refuse a list of initialisers in which others come later."""
        cfgs = getattr(module, 'init_cfg', None)
        if not isinstance(cfgs, (list, tuple)):
            return
        types = [getattr(x['type'], '__name__', x['type']) for x in cfgs]
        ours = [x.endswith(type(self).__name__) for x in types]
        # mmengine always runs its own Pretrained after the others.
        others = {'Pretrained', 'PretrainedInit'}.intersection(types)
        if any(ours) and (others or not ours[-1]):
            raise ValueError(
                'PretrainedBackbone must be the last of init_cfg, and without '
                '"Pretrained", or the others overwrite what it loads; got '
                f'{types}'
            )

    def _compare(
        self,
        module: nn.Module,
        own: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        fits: Mapping[str, Tensor],
    ) -> tuple[list[str], dict[str, list[str]]]:
        """Why a load must fail, and what is told of one that does not."""
        rest = [x for x in own if x not in fits and not x.endswith(COUNTER)]
        allowed = {
            pattern: {
                x for x in own if fnmatchcase(f'.{x}.', f'*.{pattern}.*')
            }
            for pattern in self.allow_random
        }
        permitted = [x for x in rest if x in set().union(*allowed.values())]
        wrong = [x for x in rest if x not in permitted]
        trains = {k: x.requires_grad for k, x in module.named_parameters()}
        trained = _stages(k for k, x in trains.items() if x)
        stages = _stages(own)
        problems = {
            'not in the file, would stay random': [
                x for x in wrong if x not in given
            ],
            'of another shape or type, would stay random': [
                f'{x}: {mismatch(given[x], own[x])}'
                for x in wrong
                if x in given
            ],
            # Stages that the module does not have, such as layer4 of a C4
            # backbone, are nobody's loss; other blocks of the same stage are.
            'in the file without a place in the module': [
                x for x in given if x not in own and _stage(x) in stages
            ],
            'random and frozen, would never be trained (lower frozen_stages, '
            'or do without allow_random)': [
                x for x in permitted if not trains.get(x, True)
            ],
            'of allow_random that match no tensor of the module': [
                pattern for pattern, names in allowed.items() if not names
            ],
        }
        notes = {
            'will not train, frozen': [x for x in stages if x not in trained],
            'not in the file, stay at 0': [
                x for x in own if x not in fits and x.endswith(COUNTER)
            ],
            'random, as allow_random permits': permitted,
            'in the file but not needed': [
                x for x in _stages(given) if x not in stages
            ],
        }
        return _listed(problems, '{} '), notes

    @staticmethod
    def _initialise_children(module: Any) -> None:
        """Run what mmengine would run after us, before us.

        Deformable convolutions, for one, draw their weights anew in their own
        ``init_weights``. mmengine does the same for its own ``Pretrained``.
        """
        if not hasattr(module, '_params_init_info'):
            return  # not called by init_weights
        for child in module.children():
            if hasattr(child, 'init_weights') and not getattr(
                child, 'is_init', False
            ):
                child.init_weights()
                info = f'init_weights of {type(child).__name__}'
                update_init_info(child, init_info=info)

    def _finalize(self, module: Any, backbone: Backbone) -> None:
        """Tell mmengine and the host to leave the weights alone."""
        for part in module.modules():
            if hasattr(part, 'init_weights'):
                part.is_init = True
        # By this type mmpretrain's ResNet, and others, know not to zero the
        # last norm of each block after init_weights.
        module.init_cfg = dict(type='Pretrained', checkpoint=self.checkpoint)
        if hasattr(module, '_params_init_info'):
            info = f'PretrainedBackbone: {self._file(backbone)}'
            update_init_info(module, init_info=info)

    def _file(self, backbone: Backbone) -> str:
        sha256 = backbone.sha256[:8]
        return f'"{self.checkpoint}" (sha256 {sha256}), {backbone.source}'

    def _report(
        self, module: nn.Module, backbone: Backbone, line: str
    ) -> None:
        """Say what was loaded, and what may be wrong with it."""
        hub = MessageHub.get_current_instance()
        loaded = hub.get_info(LOADED, {})
        hub.update_info(LOADED, {**loaded, backbone.sha256: self.checkpoint})
        if getattr(module, 'norm_eval', False):
            line += '; norm_eval=True: batch norms keep their statistics'
        own, given = _stages(module.state_dict()), _stages(backbone.state_dict)
        if 'layer3' in own and 'layer4' in given.keys() - own.keys():
            line += (
                '; if this is a C4 detector, its roi_head.shared_head has '
                'layer4 and needs an init_cfg like this one'
            )
        print_log(line, logger='current')
        if any(
            hasattr(part, 'conv3') and getattr(part, 'style', None) == 'caffe'
            for part in module.modules()
        ):
            _warn(
                f"{type(module).__name__} has style='caffe', and most such "
                'configs feed BGR images that are not divided by their std. '
                "Unless the checkpoint was trained so, set style='pytorch' "
                'and the RGB statistics of ImageNet in the data preprocessor'
            )


def _differences(
    module: nn.Module, backbone: Backbone, images: Mapping[str, Any]
) -> list[str]:
    """How the module looks at images in another way than in pre-training.

    Only of files that say how they were trained, and of what is known of the
    images here.
    """
    run, geometry = backbone.run, trained_geometry(backbone)
    found = []
    trained, own = map(_samplings, (geometry, vars(module)))
    if trained and own and trained != own[: len(trained)]:
        found.append(
            f'its stages were trained at one cell in {trained} pixels, '
            f'relative to the first, and are at {own} here; set the strides '
            'and dilations alike'
        )
    padding = geometry.get('conv_cfg', {}).get('padding_mode', 'zeros')
    modes = {
        x.padding_mode
        for x in module.modules()
        if isinstance(x, nn.Conv2d) and any(x.padding)
    }
    if geometry and modes - {padding}:
        found.append(
            f'it was trained with padding_mode={padding!r}, and the '
            f'convolutions here have {", ".join(map(repr, sorted(modes)))}; '
            f"set conv_cfg=dict(type='Conv2d', padding_mode={padding!r})"
        )
    if not images or not all(are_rgb(run.get(x)) for x in ('mean', 'std')):
        return found
    for name in ('mean', 'std'):
        given, expected = images[name], [float(x) for x in run[name]]
        if given is None or not np.allclose(given, expected, atol=0.5):
            found.append(
                f'it was trained on RGB images of {name} {expected}, and the '
                f'data_preprocessor here has {given}'
            )
    if not images.get('rgb', True):
        found.append(
            'it was trained on RGB images, and the data_preprocessor here '
            'leaves them BGR, as mmcv loads them; set bgr_to_rgb=True '
            '(to_rgb=True in mmpretrain)'
        )
    return found


def _images_of(module: nn.Module) -> dict[str, Any]:
    """What the model around a module makes of images; {} without one."""
    model = _model_around(module)
    if model is None:
        return {}
    preprocessor = model.data_preprocessor
    images: dict[str, Any] = {}
    for name in ('mean', 'std'):
        values = getattr(preprocessor, name, None)
        images[name] = None if values is None else values.flatten().tolist()
    flags = [getattr(preprocessor, x, None) for x in CONVERSIONS]
    images['rgb'] = getattr(model, 'reads_rgb', False) or True in flags
    return images


def _samplings(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Pixels between what a stage of a ResNet looks at, in each stage.

    A stride and, of all stages behind it, the same dilation are one, as with
    a segmentation model of output stride 8.
    """
    strides = settings.get('strides', ())
    known = saved_geometry(settings, len(strides))
    if not known.get('strides'):
        return None
    dilations = known.get('dilations', (1,) * len(known['strides']))
    steps = accumulate(known['strides'], mul)
    return tuple(a * b for a, b in zip(steps, dilations, strict=False))


def _model_around(module: nn.Module) -> BaseModel | None:
    """The model whose ``init_weights`` is running.

    mmengine gives an initialiser the backbone alone.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get('self')
        if isinstance(owner, BaseModel) and any(
            x is module for x in owner.modules()
        ):
            return owner
        frame = frame.f_back
    return None


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def mismatch(given: Any, own: Tensor) -> str:
    """What keeps a tensor of a file from taking the place of one of the model.

    Args:
        given: Of the file.
        own: Of the model.

    Returns:
        'got ..., expected ...'; empty for the same shape and kind of number,
        whatever its precision.
    """
    if not isinstance(given, Tensor):
        return f'got {type(given).__name__}, expected a tensor'
    if given.shape != own.shape:
        return f'got {tuple(given.shape)}, expected {tuple(own.shape)}'
    kinds = [
        (
            x.layout,
            x.is_meta,
            x.is_quantized,
            x.is_floating_point(),
            x.is_complex(),
            x.dtype == torch.bool,
        )
        for x in (given, own)
    ]
    if kinds[0] == kinds[1]:
        return ''
    names = [
        f'{x.layout} {x.device.type} {x.dtype}'.replace('torch.', '')
        for x in (given, own)
    ]
    return 'got {}, expected {}'.format(*names)


def _stage(name: str) -> str:
    return name.partition('.')[0]


def _stages(names: Iterable[str]) -> dict[str, None]:
    """``conv1``, ``bn1``, ``layer1`` and so on, in order."""
    return dict.fromkeys(map(_stage, names))


def _listed(groups: Mapping[str, list[str]], count: str = '') -> list[str]:
    """A line for each group that has names."""
    return [
        f'{count.format(len(names))}{what}: {first_few(names)}'
        for what, names in groups.items()
        if names
    ]


def _hints(own: Mapping[str, Tensor], backbone: Backbone) -> list[str]:
    """What to do about the usual reasons."""
    arch = describe_architecture(own)
    if arch and backbone.arch and arch != backbone.arch:
        return [
            f'The file is {backbone.arch}, the module is {arch}: take another '
            "file, or set the module's type and depth."
        ]
    hints = [
        'If some tensors are meant to stay random, name them by '
        "allow_random=['conv_offset'], for example; strict=False loads "
        'whatever fits.'
    ]
    if any(name.startswith('backbone.') for name in own):
        hints = ['This is a whole model: put init_cfg into its backbone.']
    return hints
