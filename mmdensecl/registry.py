# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Registries of mmdensecl, scope `mmdensecl`.

Each is a child of mmengine's root registry, so a config of any host
(mmpretrain, mmdet, mmseg) reaches the types here as `mmdensecl.<Type>` with
its own `default_scope` and without `custom_imports`: mmengine imports this
module when it meets the prefix, and the module in `locations` when it looks
a type up.
"""

from functools import cache

from mmengine import registry as root
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

    def __init__(self, parent: Registry, *packages: str) -> None:
        super().__init__(
            parent.name,
            parent=parent,
            scope='mmdensecl',
            locations=[f'mmdensecl.{x}' for x in packages],
        )

    def import_from_location(self) -> None:
        _register_once()
        super().import_from_location()


# Algorithms, necks, heads and losses.
MODELS = _Registry(root.MODELS, 'models')
# Matching rules, see mmdensecl/models/correspondence.py.
TASK_UTILS = _Registry(root.TASK_UTILS, 'models')
DATASETS = _Registry(root.DATASETS, 'datasets')
DATA_SAMPLERS = _Registry(root.DATA_SAMPLERS, 'datasets')
TRANSFORMS = _Registry(root.TRANSFORMS, 'datasets')
HOOKS = _Registry(root.HOOKS, 'engine', 'evaluation', 'benchmark.hooks')
OPTIM_WRAPPERS = _Registry(root.OPTIM_WRAPPERS, 'engine')
# Test loops that fit a probe to frozen features.
LOOPS = _Registry(root.LOOPS, 'engine', 'evaluation')
WEIGHT_INITIALIZERS = _Registry(root.WEIGHT_INITIALIZERS, 'transfer')
