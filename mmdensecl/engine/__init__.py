# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .config import merge_options, override_data_root
from .hooks import (ContrastMonitorHook, LambdaWarmupHook, QueueLengthHook,
                    UnlabeledDataHook)
from .launch import prepare_cpu_launch

__all__ = [
    'ContrastMonitorHook', 'LambdaWarmupHook', 'QueueLengthHook',
    'UnlabeledDataHook', 'merge_options', 'override_data_root',
    'prepare_cpu_launch'
]
