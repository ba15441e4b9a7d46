# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Registries of mmdensecl, scope `mmdensecl`.

Each is a child of mmengine's root registry, so a config of any host
(mmpretrain, mmdet, mmseg) reaches the types here as `mmdensecl.<Type>` with
its own `default_scope` and without `custom_imports`: mmengine imports this
module when it meets the prefix, and the module in `locations` when it looks
a type up.
"""

from functools import cache

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_INITIALIZERS
from mmengine.registry import Registry

from .checkpoint import register_checkpoint_loader

__all__ = [
    'DATA_SAMPLERS',
    'DATASETS',
    'HOOKS',
    'LOOPS',
    'MODELS',
    'OPTIM_WRAPPERS',
    'TASK_UTILS',
    'TRANSFORMS',
    'WEIGHT_INITIALIZERS',
]

_register_once = cache(register_checkpoint_loader)


class _Registry(Registry):
    """Lets mmengine read checkpoints as data once a type is looked up."""

    def import_from_location(self) -> None:
        _register_once()
        super().import_from_location()


# Algorithms, necks, heads and losses.
MODELS = _Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmdensecl',
    locations=['mmdensecl.models'],
)
# Matching rules, see mmdensecl/models/correspondence.py.
TASK_UTILS = _Registry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    scope='mmdensecl',
    locations=['mmdensecl.models'],
)
DATASETS = _Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='mmdensecl',
    locations=['mmdensecl.datasets'],
)
DATA_SAMPLERS = _Registry(
    'data sampler',
    parent=MMENGINE_DATA_SAMPLERS,
    scope='mmdensecl',
    locations=['mmdensecl.datasets'],
)
TRANSFORMS = _Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='mmdensecl',
    locations=['mmdensecl.datasets'],
)
HOOKS = _Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmdensecl',
    locations=[
        'mmdensecl.engine',
        'mmdensecl.evaluation',
        'mmdensecl.benchmark.hooks',
    ],
)
OPTIM_WRAPPERS = _Registry(
    'optim_wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmdensecl',
    locations=['mmdensecl.engine'],
)
# Test loops that fit a probe to frozen features.
LOOPS = _Registry(
    'loop',
    parent=MMENGINE_LOOPS,
    scope='mmdensecl',
    locations=['mmdensecl.engine', 'mmdensecl.evaluation'],
)
WEIGHT_INITIALIZERS = _Registry(
    'weight initializer',
    parent=MMENGINE_INITIALIZERS,
    scope='mmdensecl',
    locations=['mmdensecl.transfer'],
)
