# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""MoCo-v2, and the skeleton of every method."""

import logging
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn as nn
from mmengine.device import get_device
from mmengine.dist import all_gather, broadcast
from mmengine.logging import MessageHub, print_log
from mmpretrain.models import BaseSelfSupervisor
from mmpretrain.structures import DataSample
from torch import Tensor

from mmdensecl.registry import MODELS

from .compat import convert_host_state, own_head
from .distributed import (
    BatchShuffle,
    SyncedGenerator,
    auto_virtual_ranks,
    running_stats_kept,
)
from .metrics import feature_std
from .modules import (
    FeatureQueue,
    Features,
    MomentumEncoder,
    l2_normalize,
    last_map,
)

DEFAULT_QUEUE_LEN = 65536


@MODELS.register_module()
class MoCoV2(BaseSelfSupervisor):
    """MoCo-v2, and the skeleton of every method here.

    `Improved Baselines with Momentum Contrastive Learning
    <https://arxiv.org/abs/2003.04297>`_. One step: query features; momentum
    update of the key encoder; key features from a batch shuffled across the
    ranks; loss against the queue; only then are the keys enqueued, so that a
    batch is never among its own negatives.

    Args:
        backbone: Config of a backbone, mmpretrain's by default.
        neck: Config of a neck. It must return a sequence that starts with the
            (N, feat_dim) projections, such as ``MoCoV2Neck``.
        head: Config of a head.
        queue_len: Number of negative keys. 'auto' leaves it to
            :class:`mmdensecl.engine.QueueLengthHook`, which fits it to the
            dataset.
        feat_dim: Channels of the projections.
        momentum: Weight of the query encoder in the update of the key
            encoder, mmengine's convention; the paper's 0.999 is 0.001 here.
        virtual_ranks: Groups into which each process splits its batch, to
            train as that many times more processes would: batch norm sees one
            group at a time in both encoders, and keys are shuffled over all
            groups of all processes. Running statistics are those of the first
            group, as a distributed run saves those of its first process. A
            batch of fewer images than groups gives groups of one. 'auto' is 1
            where several processes train, else a group for each 32 images,
            and at least two.
        channels_last: Whether images and convolutions keep their channels
            next to each other in memory, which CPUs and tensor cores want;
            only rounding changes. 'auto' is True where there is no GPU.
        compile_encoders: Whether ``torch.compile`` makes both encoders
            faster, from the first step of a training run on; a dict has its
            arguments, such as ``dict(mode='max-autotune-no-cudagraphs')``.
            Weights keep their names.
        pretrained: Checkpoint to start from, as in mmpretrain.
        data_preprocessor: Its type defaults to mmpretrain's
            ``SelfSupDataPreprocessor``.
        init_cfg: Initialisation.
    """

    # Our pipelines load RGB; mmcv's load BGR.
    reads_rgb = True

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        head: dict = dict(type='mmdensecl.ContrastiveHead'),
        queue_len: int | str = DEFAULT_QUEUE_LEN,
        feat_dim: int = 128,
        momentum: float = 0.001,
        virtual_ranks: int | str = 1,
        channels_last: bool | str = 'auto',
        compile_encoders: bool | dict = False,
        pretrained: str | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if data_preprocessor is None or isinstance(data_preprocessor, dict):
            # With its scope, so that other hosts can build the model too.
            data_preprocessor = {
                'type': 'mmpretrain.SelfSupDataPreprocessor',
                **(data_preprocessor or {}),
            }
        super().__init__(
            backbone=backbone,
            neck=neck,
            head=head,
            pretrained=pretrained,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        self.head: Any = own_head(self.head)
        self.auto_queue_len = queue_len == 'auto'
        self.auto_virtual_ranks = virtual_ranks == 'auto'
        self.virtual_ranks = _count('virtual_ranks', virtual_ranks, auto=1)
        self.encoder_k = MomentumEncoder(self.backbone, self.neck, momentum)
        self.batch_shuffle = BatchShuffle()
        self.queue = FeatureQueue(
            _count('queue_len', queue_len, auto=DEFAULT_QUEUE_LEN), feat_dim
        )
        if channels_last not in (True, False, 'auto'):
            raise ValueError(
                "channels_last must be True, False or 'auto', "
                f'got {channels_last!r}'
            )
        if not isinstance(compile_encoders, bool | dict):
            raise ValueError(
                'compile_encoders must be True, False or a dict of arguments '
                f'of torch.compile, got {compile_encoders!r}'
            )
        if channels_last == 'auto':
            channels_last = get_device() == 'cpu'
        self.memory_format = (
            torch.channels_last if channels_last else torch.contiguous_format
        )
        self.to(memory_format=self.memory_format)
        self.compile_encoders = compile_encoders
        self.started = False

    def init_weights(self) -> None:
        """Initialise the query encoder and copy it to the key encoder."""
        # Numbers are drawn in the order of memory: a seed must mean the same
        # weights in every format.
        self.to(memory_format=torch.contiguous_format)
        super().init_weights()
        self.to(memory_format=self.memory_format)
        self.encoder_k.copy_from(self.backbone, self.neck)

    def _load_from_state_dict(
        self, state_dict, prefix, *args, **kwargs
    ) -> None:
        convert_host_state(state_dict, prefix)
        # A checkpoint of a bare backbone: both encoders start from it, or the
        # key encoder would stay random and take thousands of steps to follow.
        if not any(k.startswith(f'{prefix}encoder_k.') for k in state_dict):
            parts = f'{prefix}backbone.', f'{prefix}neck.'
            for name in list(state_dict):
                if name.startswith(parts):
                    copied = f'{prefix}encoder_k.{name[len(prefix) :]}'
                    state_dict[copied] = state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_queue_len(self, queue_len: int) -> None:
        """Start with fresh queues of another length."""
        for module in self.modules():
            if isinstance(module, FeatureQueue):
                module.resize(queue_len)
        self.auto_queue_len = False

    def loss(
        self,
        inputs: Sequence[Tensor],
        data_samples: list[DataSample] | None = None,
        **kwargs,
    ) -> dict[str, Tensor]:
        """One step of training; backward and optimiser follow in mmengine.

        Key encoder and queues move in each call, also where gradients are
        accumulated (but see :class:`mmdensecl.engine.AccumulationHook`).

        Args:
            inputs: The query views and the key views, each (N, 3, H, W),
                normalised.
            data_samples: May carry ``views``.
            **kwargs: Ignored, as in mmpretrain.

        Returns:
            Losses, weighted, and metrics.
        """
        if isinstance(inputs, Tensor) or len(inputs) != 2:
            got = 'one tensor' if isinstance(inputs, Tensor) else len(inputs)
            raise ValueError(
                'The method contrasts two views of each image, a sequence '
                f'of two (N, 3, H, W) tensors, got {got}. End the pipeline '
                'with mmdensecl.TwoViews and mmdensecl.PackViews.'
            )
        if not self.started:
            self.start(batch_size=len(inputs[0]))
        query_images, key_images = (  # (N, 3, H, W)
            x.contiguous(memory_format=self.memory_format) for x in inputs
        )
        query = self.encode_groups(self.backbone, self.neck, query_images)
        self.encoder_k.update(self.backbone, self.neck)
        key = self.encode_key(key_images)
        outputs = self.contrast(query, key, data_samples)
        self.enqueue(key)
        return outputs

    def start(self, batch_size: int) -> None:
        """Settle what must hold before the first step.

        One queue for all ranks: DDP is told to leave buffers alone, as the key
        encoder's statistics differ by rank, so the random keys are made equal
        here. And compiled encoders, where they are wanted.
        """
        if self.auto_queue_len:
            raise RuntimeError(
                "queue_len='auto' was not resolved before the first step. Add "
                "dict(type='mmdensecl.QueueLengthHook') to custom_hooks, or "
                'call model.set_queue_len(length).'
            )
        run = MessageHub.get_current_instance().runtime_info
        # Set by mmengine's Runner, and by mmdensecl.engine.protect_run.
        if run.get('loop_stage') == 'train' and not run.get('protected'):
            print_log(
                'This run may lack the hooks that let it resume, limit '
                'unreadable images and stop at a loss that is not finite. Set '
                "train_cfg.type='mmdensecl.ResumableEpochLoop', or start it "
                'by tools/train.py of mmdensecl',
                logger='current',
                level=logging.WARNING,
            )
        if self.auto_virtual_ranks:
            self.virtual_ranks = auto_virtual_ranks(batch_size)
            message = f'{batch_size} images a process'
            print_log(
                f'virtual_ranks: {self.virtual_ranks} (auto, {message})',
                logger='current',
            )
        for module in self.modules():
            if isinstance(module, FeatureQueue):
                broadcast(module.keys)
            if isinstance(module, SyncedGenerator):
                # Also one that will not be used: all that follow must get
                # the same seed whatever the number of ranks.
                module.agree()
        if self.compile_encoders is not False:
            options = self.compile_encoders
            options = {} if options is True else options
            for encoder in (self, self.encoder_k):
                encoder.backbone.compile(**options)
                encoder.neck.compile(**options)
        self.started = True

    def encode(
        self, backbone: nn.Module, neck: nn.Module, images: Tensor
    ) -> Features:
        """Features of one batch of views, (N, 3, H, W), by one encoder."""
        return Features(l2_normalize(neck((last_map(backbone(images)),))[0]))

    def encode_groups(
        self, backbone: nn.Module, neck: nn.Module, images: Tensor
    ) -> Features:
        """Features of this process's views, one virtual rank at a time."""
        if self.virtual_ranks == 1:
            return self.encode(backbone, neck, images)
        first, *others = images.tensor_split(
            min(self.virtual_ranks, len(images))
        )
        features = [self.encode(backbone, neck, first)]
        with running_stats_kept(backbone), running_stats_kept(neck):
            features += [self.encode(backbone, neck, x) for x in others]
        return Features.cat(features)

    @torch.no_grad()
    def encode_key(self, images: Tensor) -> Features:
        """Features of the key views, from a batch shuffled over ranks."""
        images, order = self.batch_shuffle.shuffle(images, self.virtual_ranks)
        key = self.encode_groups(
            self.encoder_k.backbone, self.encoder_k.neck, images
        )
        tensors = key.tensors()
        restored = self.batch_shuffle.unshuffle(list(tensors.values()), order)
        return key.replace(dict(zip(tensors, restored, strict=True)))

    def contrast(
        self,
        query: Features,
        key: Features,
        data_samples: list[DataSample] | None,
    ) -> dict[str, Tensor]:
        """Losses and metrics of a step, whose own keys are no negatives."""
        loss, metrics = self.head.loss(
            query.global_proj, key.global_proj, self.queue.negatives
        )
        outputs = {f'global_{name}': x for name, x in metrics.items()}
        if len(query.global_proj) > 1:  # one vector has no spread
            outputs['feat_std'] = feature_std(query.global_proj)
        return dict(
            loss_global=loss, **outputs, queue_fill=100 * self.queue.fill
        )

    def enqueue(self, key: Features) -> None:
        """Put the keys of all ranks into the queue, equal on all ranks."""
        self.queue.enqueue(torch.cat(all_gather(key.global_proj)))


def _count(name: str, value: int | str, auto: int) -> int:
    """An option that is a count or 'auto', as a number."""
    if value == 'auto':
        return auto
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"{name} must be a positive int or 'auto', got {value!r}"
        )
    return int(value)
