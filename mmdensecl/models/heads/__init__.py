# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .contrastive_head import ContrastiveHead

__all__ = ['ContrastiveHead']
