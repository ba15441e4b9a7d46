# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .info_nce import InfoNCE, InfoNCEResult, info_nce, info_nce_reference

__all__ = ['InfoNCE', 'InfoNCEResult', 'info_nce', 'info_nce_reference']
