# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Loops, hooks and what the tools share."""

from mmdensecl.moved import getattr_moved

from .bfloat16 import (
    BFloat16OptimWrapper,
    native_bfloat16,
    use_mixed_precision,
)
from .command_line import make_parser, read_config
from .config import (
    ConfigError,
    check_data_exists,
    check_weight_sources,
    dicts,
    merge_options,
    override_data_root,
    set_pretrained,
)
from .hooks import (
    AccumulationHook,
    BufferedRuntimeInfoHook,
    CheckpointKeysHook,
    ContrastMonitorHook,
    FollowConfigHook,
    LambdaWarmupHook,
    QueueLengthHook,
    SafeCheckpointHook,
    SamplePredictionsHook,
    TerminationHook,
    UnlabeledDataHook,
    VisualizeFeaturesHook,
    add_checkpoint_check,
)
from .launch import prepare_cpu_launch
from .protection import protect_run
from .resume import find_resumable
from .train_loop import ResumableEpochLoop
from .work_dir_lock import lock_work_dir

__all__ = [
    'AccumulationHook',
    'BFloat16OptimWrapper',
    'BufferedRuntimeInfoHook',
    'CheckpointKeysHook',
    'ConfigError',
    'ContrastMonitorHook',
    'FollowConfigHook',
    'LambdaWarmupHook',
    'QueueLengthHook',
    'ResumableEpochLoop',
    'SafeCheckpointHook',
    'SamplePredictionsHook',
    'TerminationHook',
    'UnlabeledDataHook',
    'VisualizeFeaturesHook',
    'add_checkpoint_check',
    'check_data_exists',
    'check_weight_sources',
    'dicts',
    'find_resumable',
    'lock_work_dir',
    'native_bfloat16',
    'make_parser',
    'merge_options',
    'override_data_root',
    'prepare_cpu_launch',
    'protect_run',
    'read_config',
    'set_pretrained',
    'use_mixed_precision',
]

__getattr__ = getattr_moved(__name__)
