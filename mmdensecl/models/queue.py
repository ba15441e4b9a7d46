# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class FeatureQueue(nn.Module):
    """First-in-first-out memory of normalised keys (MoCo, section 3.2).

    It starts with random directions, as the authors' does. Rows are keys, so
    an enqueue writes contiguous memory; the count of keys ever enqueued gives
    the pointer and the fill, stays on the device, and is saved with the keys.

    Args:
        length (int): Number of keys held, K.
        dim (int): Size of a key, D.

    Raises:
        ValueError: ``length`` or ``dim`` is below 1.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise ValueError('A queue needs a length and a dim of at least '
                             f'1, got length={length}, dim={dim}')
        self.register_buffer('keys', self._random_keys(length, dim))
        self.register_buffer('enqueued', torch.zeros((), dtype=torch.long))

    @staticmethod
    def _random_keys(length: int, dim: int) -> Tensor:
        return F.normalize(torch.randn(length, dim), dim=1)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def pointer(self) -> Tensor:
        """Tensor: Row that the next key overwrites, a 0-d long."""
        return self.enqueued % len(self)

    @property
    def fill(self) -> Tensor:
        """Tensor: Share of rows that hold real keys, a 0-d float."""
        return (self.enqueued / len(self)).clamp(max=1)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest rows, around the end where needed.

        Args:
            keys (Tensor): Normalised keys, (B, D), any B; of more keys than
                the queue holds, the last ones stay.
        """
        surplus = max(0, len(keys) - len(self))
        rows = torch.arange(surplus, len(keys), device=self.keys.device)
        rows = (rows + self.enqueued) % len(self)
        self.keys[rows] = keys[surplus:].to(self.keys)
        self.enqueued += len(keys)

    @torch.no_grad()
    def resize(self, length: int) -> None:
        """Start afresh with another length.

        Args:
            length (int): The new number of rows, at least 1.
        """
        fresh = type(self)(length, self.keys.size(1))
        self.keys = fresh.keys.to(self.keys)
        self.enqueued.zero_()

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        # mmengine loads with strict=False and only warns when shapes differ:
        # a resumed run would go on with a random queue.
        saved = state_dict.get(f'{prefix}keys')
        if saved is not None and saved.shape != self.keys.shape:
            raise ValueError(
                f'The checkpoint holds a queue "{prefix}keys" of '
                f'{tuple(saved.shape)} keys x channels, the model one of '
                f'{tuple(self.keys.shape)}. Set model.queue_len='
                f'{len(saved)} and model.feat_dim={saved.size(1)}, or start '
                'without this checkpoint.')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
