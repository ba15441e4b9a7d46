# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Hooks of the Runner."""

from mmdensecl.moved import getattr_moved

from .checkpoint_hook import SafeCheckpointHook, save_now
from .checkpoint_keys_hook import CheckpointKeysHook, add_checkpoint_check
from .contrast_monitor_hook import ContrastMonitorHook
from .lambda_warmup_hook import LambdaWarmupHook
from .queue_length_hook import QueueLengthHook, fit_queue_len
from .sample_predictions_hook import SamplePredictionsHook
from .termination_hook import TerminationHook
from .unlabeled_data_hook import UnlabeledDataHook
from .visualize_features_hook import VisualizeFeaturesHook

__all__ = [
    'CheckpointKeysHook',
    'ContrastMonitorHook',
    'LambdaWarmupHook',
    'QueueLengthHook',
    'SafeCheckpointHook',
    'SamplePredictionsHook',
    'TerminationHook',
    'UnlabeledDataHook',
    'VisualizeFeaturesHook',
    'add_checkpoint_check',
    'fit_queue_len',
    'save_now',
]

__getattr__ = getattr_moved(__name__)
