# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Dense self-supervised pre-training for the OpenMMLab toolboxes.

Importing this package changes nothing outside of it. mmengine reads
checkpoints through ours (:mod:`mmdensecl.checkpoint`) as soon as a config
names one of our types or one of our tools starts.
"""

from importlib import import_module

from .moved import register_moved_modules
from .version import __version__

# Imported when they are asked for: they bring a host.
_LAZY = dict(
    FrozenBackbone='.transfer.feature_extractor',
    load_backbone='.transfer.feature_extractor',
    register_models='.model_hub',
)

__all__ = ['__version__', *_LAZY]

register_moved_modules()


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
