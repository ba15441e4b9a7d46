# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Hooks of the Runner."""

from mmdensecl.moved import getattr_moved

from .accumulation_hook import AccumulationHook
from .checkpoint_hook import SafeCheckpointHook, save_now
from .checkpoint_keys_hook import CheckpointKeysHook, add_checkpoint_check
from .contrast_monitor_hook import ContrastMonitorHook
from .follow_config_hook import FollowConfigHook
from .lambda_warmup_hook import LambdaWarmupHook
from .queue_length_hook import QueueLengthHook, fit_queue_len
from .runtime_info_hook import BufferedRuntimeInfoHook, flush_logs
from .sample_predictions_hook import SamplePredictionsHook
from .termination_hook import TerminationHook
from .unlabeled_data_hook import UnlabeledDataHook
from .visualize_features_hook import VisualizeFeaturesHook

__all__ = [
    'AccumulationHook',
    'BufferedRuntimeInfoHook',
    'CheckpointKeysHook',
    'ContrastMonitorHook',
    'FollowConfigHook',
    'LambdaWarmupHook',
    'QueueLengthHook',
    'SafeCheckpointHook',
    'SamplePredictionsHook',
    'TerminationHook',
    'UnlabeledDataHook',
    'VisualizeFeaturesHook',
    'add_checkpoint_check',
    'fit_queue_len',
    'flush_logs',
    'save_now',
]

__getattr__ = getattr_moved(__name__)
