# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The methods; imports nothing of datasets, engine or transfer."""

from .clustering import (
    assign_clusters,
    kmeans_plusplus,
    kmeans_step,
    sinkhorn,
    spherical_kmeans,
)
from .correspondence import (
    BackboneSimilarity,
    BalancedSimilarity,
    GeometricMatch,
    Match,
    MatchingRule,
    MutualNearestNeighbor,
    NearestNeighbors,
    ProjectionSimilarity,
    RandomMatch,
)
from .data_preprocessors import DeviceViews
from .densecl import DenseCL
from .distributed import BatchShuffle, SyncedGenerator, exchange_rows
from .dsc import DSC, CategoryHead, KMeansCategoryHead, PrototypeCategoryHead
from .losses import (
    ContrastiveHead,
    InfoNCE,
    InfoNCEResult,
    QueueStatistics,
    info_nce,
    info_nce_reference,
    stream_queue,
    sup_con,
)
from .moco import MoCoV2
from .modules import FeatureQueue, Features, MomentumEncoder
from .necks import DenseCLNeck
