# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .category_heads import (CategoryHead, KMeansCategoryHead,
                             PrototypeCategoryHead)
from .contrastive_head import ContrastiveHead

__all__ = [
    'CategoryHead', 'ContrastiveHead', 'KMeansCategoryHead',
    'PrototypeCategoryHead'
]
