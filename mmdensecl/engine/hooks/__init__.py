# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .contrast_monitor_hook import ContrastMonitorHook
from .lambda_warmup_hook import LambdaWarmupHook
from .queue_length_hook import QueueLengthHook, fit_queue_len
from .unlabeled_data_hook import UnlabeledDataHook

__all__ = [
    'ContrastMonitorHook', 'LambdaWarmupHook', 'QueueLengthHook',
    'UnlabeledDataHook', 'fit_queue_len'
]
