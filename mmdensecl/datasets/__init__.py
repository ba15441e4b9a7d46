# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .folder import UnlabeledFolder, UnlabeledList
from .samplers import ShardSampler
from .shards import UnlabeledShards
from .transforms import DecodeRGB, DrawViews, PackPicture, PackViews, TwoViews
from .unlabeled import UnlabeledDataset, UnreadableImageError

__all__ = [
    'DecodeRGB', 'DrawViews', 'PackPicture', 'PackViews', 'ShardSampler',
    'TwoViews', 'UnlabeledDataset', 'UnlabeledFolder', 'UnlabeledList',
    'UnlabeledShards', 'UnreadableImageError'
]
