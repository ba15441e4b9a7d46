# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import warnings
from copy import deepcopy
from itertools import chain

import torch
import torch.nn as nn


class MomentumEncoder(nn.Module):
    """The key encoder: a slowly moving copy of backbone and neck.

    Its batch-norm statistics are its own; only parameters are averaged, as
    in the authors' code.

    Args:
        backbone (nn.Module): The query backbone to copy.
        neck (nn.Module): The query neck to copy.
        momentum (float): Weight of the *query* in an update, mmengine's
            convention: ``key = (1 - momentum) * key + momentum * query``.
            The papers' m = 0.999 is 0.001 here. Defaults to 0.001.

    Raises:
        ValueError: ``momentum`` is not in [0, 1].
    """

    def __init__(self,
                 backbone: nn.Module,
                 neck: nn.Module,
                 momentum: float = 0.001) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f'momentum must be in [0, 1], got {momentum}')
        if momentum > 0.5:
            warnings.warn(
                f'momentum={momentum} is the weight of the query encoder: the '
                'key encoder will hardly differ from it. The m=0.999 of the '
                'papers is written momentum=0.001 here, as in mmengine.')
        self.momentum = momentum
        self.backbone = deepcopy(backbone)
        self.neck = deepcopy(neck)
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, backbone: nn.Module, neck: nn.Module) -> None:
        """Move the parameters one step towards the query's."""
        query = list(chain(backbone.parameters(), neck.parameters()))
        # One fused kernel over all tensors rather than one for each.
        key = list(chain(self.backbone.parameters(), self.neck.parameters()))
        torch._foreach_lerp_(key, query, self.momentum)

    @torch.no_grad()
    def copy_from(self, backbone: nn.Module, neck: nn.Module) -> None:
        """Become equal to the query encoder, statistics included."""
        self.backbone.load_state_dict(backbone.state_dict())
        self.neck.load_state_dict(neck.state_dict())
