# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .batch_shuffle import BatchShuffle, exchange_rows
from .clustering import (move_centers, nearest_center, sinkhorn,
                         spherical_kmeans, spread_points)
from .correspondence import (BackboneSimilarity, GeometricMatch, Match,
                             MatchingRule, MutualNearestNeighbor,
                             NearestNeighbors, ProjectionSimilarity,
                             RandomMatch)
from .data_preprocessors import DeviceViews
from .densecl import DenseCL
from .dsc import DSC
from .features import Features
from .heads import (CategoryHead, ContrastiveHead, KMeansCategoryHead,
                    PrototypeCategoryHead)
from .losses import (InfoNCE, InfoNCEResult, QueueStatistics, info_nce,
                     info_nce_reference, stream_queue, sup_con)
from .momentum_contrast import MoCoV2
from .momentum_encoder import MomentumEncoder
from .necks import DenseCLNeck
from .queue import FeatureQueue
from .shared_randomness import SharedRandomness

__all__ = [
    'BackboneSimilarity', 'BatchShuffle', 'CategoryHead', 'ContrastiveHead',
    'DSC', 'DenseCL', 'DenseCLNeck', 'DeviceViews', 'Features', 'FeatureQueue',
    'GeometricMatch', 'InfoNCE', 'InfoNCEResult', 'KMeansCategoryHead',
    'Match', 'MatchingRule', 'MoCoV2', 'MomentumEncoder',
    'MutualNearestNeighbor', 'NearestNeighbors', 'ProjectionSimilarity',
    'PrototypeCategoryHead', 'QueueStatistics', 'RandomMatch',
    'SharedRandomness', 'exchange_rows', 'info_nce', 'info_nce_reference',
    'move_centers', 'nearest_center', 'sinkhorn', 'spherical_kmeans',
    'spread_points', 'stream_queue', 'sup_con'
]
