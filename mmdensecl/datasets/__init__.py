# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .transforms import DecodeRGB, PackViews, TwoViews
from .unlabeled import (UnlabeledDataset, UnlabeledFolder, UnlabeledList,
                        UnlabeledLMDB, UnreadableImageError)

__all__ = [
    'DecodeRGB', 'PackViews', 'TwoViews', 'UnlabeledDataset',
    'UnlabeledFolder', 'UnlabeledList', 'UnlabeledLMDB', 'UnreadableImageError'
]
