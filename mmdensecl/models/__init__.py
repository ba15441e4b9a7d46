# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .clustering import (assign_clusters, kmeans_plusplus, kmeans_step,
                         sinkhorn, spherical_kmeans)
from .correspondence import (BackboneSimilarity, BalancedSimilarity,
                             GeometricMatch, Match, MatchingRule,
                             MutualNearestNeighbor, NearestNeighbors,
                             ProjectionSimilarity, RandomMatch)
from .data_preprocessors import DeviceViews
from .densecl import DenseCL
from .distributed import BatchShuffle, SyncedGenerator, exchange_rows
from .dsc import DSC, CategoryHead, KMeansCategoryHead, PrototypeCategoryHead
from .losses import (ContrastiveHead, InfoNCE, InfoNCEResult, QueueStatistics,
                     info_nce, info_nce_reference, stream_queue, sup_con)
from .moco import MoCoV2
from .modules import Features, FeatureQueue, MomentumEncoder
from .necks import DenseCLNeck

__all__ = [
    'BackboneSimilarity', 'BalancedSimilarity', 'BatchShuffle', 'CategoryHead',
    'ContrastiveHead', 'DSC', 'DenseCL', 'DenseCLNeck', 'DeviceViews',
    'FeatureQueue', 'Features', 'GeometricMatch', 'InfoNCE', 'InfoNCEResult',
    'KMeansCategoryHead', 'Match', 'MatchingRule', 'MoCoV2', 'MomentumEncoder',
    'MutualNearestNeighbor', 'NearestNeighbors', 'ProjectionSimilarity',
    'PrototypeCategoryHead', 'QueueStatistics', 'RandomMatch',
    'SyncedGenerator', 'assign_clusters', 'exchange_rows', 'info_nce',
    'info_nce_reference', 'kmeans_plusplus', 'kmeans_step', 'sinkhorn',
    'spherical_kmeans', 'stream_queue', 'sup_con'
]
