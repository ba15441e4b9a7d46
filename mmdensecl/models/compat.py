# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Configs and checkpoints of mmpretrain's and mmselfsup's MoCo and DenseCL."""

import torch
import torch.nn as nn
from mmpretrain.models import heads
from torch import Tensor

from mmdensecl.registry import MODELS

# Names of the hosts' key encoder, an average of Sequential(backbone, neck).
HOST_KEY_ENCODER = {
    'encoder_k.module.0.': 'encoder_k.backbone.',
    'encoder_k.module.1.': 'encoder_k.neck.',
}
HOST_QUEUES = {'queue': 'queue', 'queue2': 'dense_queue'}

PLAIN_CROSS_ENTROPY = dict(
    reduction='mean',
    loss_weight=1,
    class_weight=None,
    use_sigmoid=False,
    use_soft=False,
)


def own_head(head: nn.Module) -> nn.Module:
    """Replace mmpretrain's contrastive head by ours; leave any other.

    Both are InfoNCE with a temperature; ours does not hold the logits.
    """
    if not isinstance(head, heads.ContrastiveHead):
        return head
    loss = head.loss_module
    if type(loss).__name__ != 'CrossEntropyLoss' or any(
        getattr(loss, name, plain) != plain
        for name, plain in PLAIN_CROSS_ENTROPY.items()
    ):
        raise ValueError(
            'Of mmpretrain.ContrastiveHead only a plain CrossEntropyLoss is '
            f'understood, got {loss}. Set model.head=dict('
            "type='mmdensecl.ContrastiveHead', loss=dict("
            f"type='mmdensecl.InfoNCE', temperature={head.temperature}))."
        )
    loss = dict(type='mmdensecl.InfoNCE', temperature=head.temperature)
    return MODELS.build(dict(type='mmdensecl.ContrastiveHead', loss=loss))


def convert_host_state(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Rename a training checkpoint of mmpretrain or mmselfsup to our names.

    In place; any other is left alone. The pointer of a queue becomes the count
    of its keys; how many of them were ever replaced is not saved there, so the
    queue counts as full.
    """
    queues = [name for name in HOST_QUEUES if f'{prefix}{name}' in state_dict]
    if not queues:
        return
    # Before its first step the hosts' key encoder is yet to be made equal to
    # the query's.
    fresh = state_dict.pop(f'{prefix}encoder_k.steps', 1) == 0
    for name in list(state_dict):
        for host, own in HOST_KEY_ENCODER.items():
            if name.startswith(prefix + host):
                x = state_dict.pop(name)
                if not fresh:
                    state_dict[prefix + own + name[len(prefix + host) :]] = x
    for host in queues:
        keys = state_dict.pop(f'{prefix}{host}').t().contiguous()
        pointer = state_dict.pop(f'{prefix}{host}_ptr', torch.zeros(1))
        own = prefix + HOST_QUEUES[host]
        state_dict[f'{own}.keys'] = keys
        state_dict[f'{own}.enqueued'] = len(keys) + pointer.long().sum()
