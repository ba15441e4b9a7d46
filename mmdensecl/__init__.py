# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Dense self-supervised pre-training for the OpenMMLab toolboxes."""
from .checkpoint import register_checkpoint_loader
from .model_hub import register_when_imported
from .moved import register_moved_modules
from .onedl import let_configs_name_mmseg
from .version import __version__

# Imported when they are asked for: they bring a host.
_LAZY = ('FrozenBackbone', 'load_backbone')

__all__ = ['__version__', *_LAZY]

# mmengine imports this package as soon as a config names one of its types,
# which is before it reads any checkpoint.
register_checkpoint_loader()
# For mmpretrain.get_model and mmpretrain.list_models.
register_when_imported()
let_configs_name_mmseg()
register_moved_modules()


def __getattr__(name: str):
    if name in _LAZY:
        from .transfer import feature_extractor

        return getattr(feature_extractor, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
