# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .pretrained_backbone import PretrainedBackbone
from .read_backbone import (Backbone, NoBackboneError, describe_architecture,
                            read_backbone)

__all__ = [
    'Backbone', 'NoBackboneError', 'PretrainedBackbone',
    'describe_architecture', 'read_backbone'
]
