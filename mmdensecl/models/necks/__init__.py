# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .densecl_neck import DenseCLNeck

__all__ = ['DenseCLNeck']
