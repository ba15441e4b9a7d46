# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import Optional, Union

import torch
import torch.nn as nn
from mmengine.dist import sync_random_seed
from torch import Tensor


class SharedRandomness(nn.Module):
    """Random numbers that are the same on all ranks and after a resume.

    The ranks do not talk: what is drawn depends on a seed agreed on at the
    first step and on the number of the step, and both are saved with the
    model's weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed: Optional[int] = None
        self.step = 0

    def get_extra_state(self) -> Tensor:
        seed = -1 if self.seed is None else self.seed
        return torch.tensor([seed, self.step])

    def set_extra_state(self, state: Tensor) -> None:
        seed, self.step = state.tolist()
        self.seed = None if seed < 0 else seed

    def agree(self) -> None:
        """Agree on a seed with the other ranks, unless there is one."""
        if self.seed is None:
            self.seed = sync_random_seed()

    def next_generator(self,
                       device: Union[torch.device,
                                     str] = 'cpu') -> torch.Generator:
        """The generator of the next step.

        Args:
            device (torch.device | str): Where it draws. Defaults to 'cpu'.

        Returns:
            torch.Generator: Freshly seeded; torch's own stays as it is.
        """
        self.agree()
        generator = torch.Generator(device)
        # Torch mixes nearby seeds well; the prime keeps runs whose seeds
        # differ by little from sharing draws at shifted steps.
        generator.manual_seed(self.seed * 1_000_003 + self.step)
        self.step += 1
        return generator
