# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Evaluation of features: probes with labels, matching without."""

from .knn_hook import KNNHook
from .probe_loop import KNNLoop, LowShotLoop, SVMLoop, is_probe

__all__ = ['KNNHook', 'KNNLoop', 'LowShotLoop', 'SVMLoop', 'is_probe']
