# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Unlabeled datasets, samplers and transforms."""

from mmdensecl.moved import getattr_moved

from .folder import UnlabeledFolder, UnlabeledList
from .samplers import ShardSampler
from .shards import UnlabeledShards
from .transforms import (
    DecodeRGB,
    PackImage,
    PackViews,
    SampleTwoCropParams,
    TwoViews,
)
from .unlabeled import UnlabeledDataset, UnreadableImageError

__all__ = [
    'DecodeRGB',
    'SampleTwoCropParams',
    'PackImage',
    'PackViews',
    'ShardSampler',
    'TwoViews',
    'UnlabeledDataset',
    'UnlabeledFolder',
    'UnlabeledList',
    'UnlabeledShards',
    'UnreadableImageError',
]

__getattr__ = getattr_moved(__name__)
