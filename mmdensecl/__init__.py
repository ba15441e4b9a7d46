# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Dense self-supervised pre-training for the OpenMMLab toolboxes."""
from .checkpoint import register_checkpoint_loader
from .version import __version__

__all__ = ['__version__']

# mmengine imports this package as soon as a config names one of its types,
# which is before it reads any checkpoint.
register_checkpoint_loader()
