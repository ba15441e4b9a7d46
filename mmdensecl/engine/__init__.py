# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .bfloat16 import BFloat16OptimWrapper, has_bfloat16, use_mixed_precision
from .command_line import make_parser, read_config
from .config import (check_weight_sources, dicts, merge_options,
                     override_data_root, set_pretrained)
from .hooks import (CheckpointKeysHook, ContrastMonitorHook, KNNHook,
                    LambdaWarmupHook, QueueLengthHook, SamplePredictionsHook,
                    UnlabeledDataHook, VisualizeFeaturesHook,
                    add_checkpoint_check)
from .launch import prepare_cpu_launch
from .probe_loop import KNNLoop, LowShotLoop, SVMLoop, is_probe

__all__ = [
    'BFloat16OptimWrapper', 'has_bfloat16', 'use_mixed_precision',
    'CheckpointKeysHook', 'ContrastMonitorHook', 'KNNHook', 'KNNLoop',
    'LambdaWarmupHook', 'LowShotLoop', 'QueueLengthHook', 'SVMLoop',
    'SamplePredictionsHook', 'UnlabeledDataHook', 'VisualizeFeaturesHook',
    'add_checkpoint_check', 'check_weight_sources', 'dicts', 'is_probe',
    'make_parser', 'merge_options', 'override_data_root', 'prepare_cpu_launch',
    'read_config', 'set_pretrained'
]
