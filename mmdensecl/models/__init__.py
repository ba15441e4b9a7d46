# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .batch_shuffle import BatchShuffle, exchange_rows
from .correspondence import (BackboneSimilarity, GeometricMatch, Match,
                             MatchingRule, MutualNearestNeighbor,
                             ProjectionSimilarity, RandomMatch)
from .data_preprocessors import DeviceViews
from .densecl import DenseCL
from .features import Features
from .heads import ContrastiveHead
from .losses import (InfoNCE, InfoNCEResult, QueueStatistics, info_nce,
                     info_nce_reference, stream_queue)
from .momentum_contrast import MoCoV2
from .momentum_encoder import MomentumEncoder
from .necks import DenseCLNeck
from .queue import FeatureQueue

__all__ = [
    'BackboneSimilarity', 'BatchShuffle', 'ContrastiveHead', 'DenseCL',
    'DenseCLNeck', 'DeviceViews', 'Features', 'FeatureQueue', 'GeometricMatch',
    'InfoNCE', 'InfoNCEResult', 'Match', 'MatchingRule', 'MoCoV2',
    'MomentumEncoder', 'MutualNearestNeighbor', 'ProjectionSimilarity',
    'QueueStatistics', 'RandomMatch', 'exchange_rows', 'info_nce',
    'info_nce_reference', 'stream_queue'
]
