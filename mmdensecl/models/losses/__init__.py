# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .info_nce import InfoNCE, InfoNCEResult, info_nce, info_nce_reference
from .queue_statistics import QueueStatistics, stream_queue
from .sup_con import sup_con

__all__ = [
    'InfoNCE', 'InfoNCEResult', 'QueueStatistics', 'info_nce',
    'info_nce_reference', 'stream_queue', 'sup_con'
]
