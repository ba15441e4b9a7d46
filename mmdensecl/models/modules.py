# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What encoders give, and what a step keeps: the queue, the key encoder."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

# Of what a method does not compute.
NOTHING = torch.empty(0)


class Features(NamedTuple):
    """Outputs of an encoder for N images, L2-normalised over channels.

    MoCo-v2 has the first alone.

    Attributes:
        global_proj: Global projections, (N, D).
        dense_proj: Dense projections of the P = H * W cells of a grid, row by
            row, (N, D, P).
        dense_proj_mean: Normalised mean of the dense projections before their
            normalisation, (N, D).
        backbone_feats: The backbone map on the same grid, (N, C, P).
        shape: Height and width of the grid.
    """

    global_proj: Tensor
    dense_proj: Tensor = NOTHING
    dense_proj_mean: Tensor = NOTHING
    backbone_feats: Tensor = NOTHING
    shape: tuple[int, int] = (0, 0)

    def replace(self, tensors: dict[str, Tensor]) -> 'Features':
        """Return the same with other tensors, by name."""
        return Features(**{**self._asdict(), **tensors})

    def tensors(self) -> dict[str, Tensor]:
        """Return what was computed, by name."""
        fields = self._asdict()
        del fields['shape']
        return {k: x for k, x in fields.items() if x is not NOTHING}

    @classmethod
    def cat(cls, parts: Sequence['Features']) -> 'Features':
        """Concatenate along the images."""
        names = parts[0].tensors()
        return parts[0].replace(
            {k: torch.cat([getattr(x, k) for x in parts]) for k in names}
        )


def l2_normalize(x: Tensor) -> Tensor:
    """Scale to unit length over dim 1, in float32 at least."""
    return F.normalize(x.float() if x.itemsize < 4 else x, dim=1)


def last_map(maps: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the last of a backbone's maps.

    The others take part with weight 0: DDP waits for a gradient of every
    parameter, those of other maps included.
    """
    if isinstance(maps, Tensor):
        return maps
    *unused, last = maps
    if unused and last.requires_grad:
        last = last + 0 * sum(x.mean() for x in unused)
    return last


def backbone_features(maps: Tensor) -> Features:
    """Features of a backbone map (N, C, H, W) alone, for matching."""
    return Features(
        global_proj=l2_normalize(maps.mean(dim=(2, 3))),
        backbone_feats=l2_normalize(maps.flatten(start_dim=2)),
        shape=(maps.size(2), maps.size(3)),
    )


def gather_positions(x: Tensor, index: Tensor) -> Tensor:
    """Gather vectors (N, D, R) at given positions of each image, as rows.

    From index (N, P) rows (N * P, D), from (N, P, k) rows (N * P, k, D).
    """
    flat = index.flatten(start_dim=1)[..., None].expand(-1, -1, x.size(1))
    rows = x.transpose(1, 2).gather(1, flat).flatten(0, 1)
    return rows if index.dim() == 2 else rows.unflatten(0, (-1, index.size(2)))


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError if one of the named arguments is too small."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')


def check_positive(**values: float) -> None:
    """Raise ValueError if one of the named arguments is not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f'{name} must be above 0, got {value}')


class FeatureQueue(nn.Module):
    """First-in-first-out memory of normalised keys (MoCo, section 3.2).

    It starts with random directions, as the authors' does. The count of keys
    ever enqueued gives the pointer and the fill, stays on the device, and is
    saved with the keys. Enqueued keys are written when :attr:`negatives` is
    read next or the state is saved, so that a loss that needs the negatives in
    its backward pass still finds them (ours has its gradient by then).

    Args:
        length: Number of keys held, K, at least 1.
        dim: Size of a key, D, at least 1.
    """

    keys: Tensor
    enqueued: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        check_at_least(1, length=length, dim=dim)
        keys = F.normalize(torch.randn(length, dim), dim=1)
        self.register_buffer('keys', keys)
        self.register_buffer('enqueued', torch.zeros((), dtype=torch.long))
        self._pending: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def negatives(self) -> Tensor:
        """All keys, up to date, (K, D)."""
        self.flush()
        return self.keys

    @property
    def pointer(self) -> Tensor:
        """Row that the next key overwrites, a 0-d long."""
        self.flush()
        return self.enqueued % len(self)

    @property
    def fill(self) -> Tensor:
        """Share of rows that hold real keys, a 0-d float."""
        self.flush()
        return (self.enqueued / len(self)).clamp(max=1)

    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest rows by keys (B, D), from the next read on.

        Of more keys than the queue holds, the last ones stay.
        """
        self._pending.append(keys.detach().clone())

    @torch.no_grad()
    def flush(self) -> None:
        """Write what was enqueued, around the end where needed."""
        for keys in self._pending:
            surplus = max(0, len(keys) - len(self))
            rows = torch.arange(surplus, len(keys), device=self.keys.device)
            rows = (rows + self.enqueued) % len(self)
            self.keys[rows] = keys[surplus:].to(self.keys)
            self.enqueued += len(keys)
        self._pending.clear()

    @torch.no_grad()
    def resize(self, length: int) -> None:
        """Start afresh with another length."""
        fresh = type(self)(length, self.keys.size(1))
        self.keys = fresh.keys.to(self.keys)
        self.enqueued.zero_()
        self._pending.clear()

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self.flush()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict, prefix, *args, **kwargs
    ) -> None:
        # mmengine loads with strict=False and only warns when shapes differ:
        # a resumed run would go on with a random queue.
        saved = state_dict.get(f'{prefix}keys')
        if saved is not None and saved.shape != self.keys.shape:
            raise ValueError(
                f'The checkpoint holds a queue "{prefix}keys" of '
                f'{tuple(saved.shape)} keys x channels, the model one of '
                f'{tuple(self.keys.shape)}. Set model.queue_len='
                f'{len(saved)} and model.feat_dim={saved.size(1)}, or start '
                'without this checkpoint.'
            )
        self._pending.clear()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MomentumEncoder(nn.Module):
    """The key encoder: a slowly moving copy of backbone and neck.

    It is in train mode, too, and its batch-norm statistics are its own; only
    parameters are averaged, as in the authors' code.

    Args:
        backbone: The query backbone to copy.
        neck: The query neck to copy.
        momentum: Weight of the *query* in an update, mmengine's convention:
            ``key = (1 - momentum) * key + momentum * query``. The papers'
            m = 0.999 is 0.001 here.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, momentum: float = 0.001
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f'momentum must be in [0, 1], got {momentum}')
        if momentum > 0.5:
            warnings.warn(
                f'momentum={momentum} is the weight of the query encoder: the '
                'key encoder will hardly differ from it. The m=0.999 of the '
                'papers is written momentum=0.001 here, as in mmengine.',
                stacklevel=2,
            )
        self.momentum = momentum
        self.backbone = deepcopy(backbone)
        self.neck = deepcopy(neck)
        # The copies start from the query's weights, not from a file.
        for module in self.modules():
            if isinstance(module, BaseModule):
                module.init_cfg = None
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, backbone: nn.Module, neck: nn.Module) -> None:
        """Move the parameters one step towards the query's (MoCo, eq. 2)."""
        query: list[Tensor] = [*backbone.parameters(), *neck.parameters()]
        key: list[Tensor] = [*self.parameters()]  # in the same order
        # One fused kernel over all tensors rather than one for each.
        torch._foreach_lerp_(key, query, self.momentum)

    @torch.no_grad()
    def copy_from(self, backbone: nn.Module, neck: nn.Module) -> None:
        """Become equal to the query encoder, statistics included."""
        for own, query in ((self.backbone, backbone), (self.neck, neck)):
            # Not by state_dict, in which some networks leave buffers out.
            for tensors in ('parameters', 'buffers'):
                for a, b in zip(
                    getattr(own, tensors)(),
                    getattr(query, tensors)(),
                    strict=True,
                ):
                    a.copy_(b)
