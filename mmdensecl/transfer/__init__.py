# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The way of weights: from any checkpoint into any model."""

from .architecture import describe_architecture
from .pretrained_backbone import PretrainedBackbone
from .read_backbone import Backbone, NoBackboneError, read_backbone

__all__ = [
    'Backbone',
    'NoBackboneError',
    'PretrainedBackbone',
    'describe_architecture',
    'read_backbone',
]
