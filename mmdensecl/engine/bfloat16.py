# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from contextlib import contextmanager
from typing import Iterator

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper

from mmdensecl.registry import OPTIM_WRAPPERS


def has_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 itself; a CPU always may."""
    return get_device() != 'cuda' or torch.cuda.is_bf16_supported(
        including_emulation=False)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16.

    bfloat16 has the range of float32, so unlike mmengine's
    ``AmpOptimWrapper`` it scales no loss: nothing waits for the GPU to say
    whether a gradient overflowed, the checkpoints are those of
    ``OptimWrapper``, and it also runs on a CPU.

    Args:
        *args: Of mmengine's ``OptimWrapper``.
        **kwargs: Of mmengine's ``OptimWrapper``.

    Raises:
        RuntimeError: The GPU has no bfloat16.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not has_bfloat16():
            raise RuntimeError(
                f'{torch.cuda.get_device_name()} has no bfloat16. Train in '
                'float16 with --cfg-options '
                'optim_wrapper.type=AmpOptimWrapper')

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Where the forward pass of a step runs."""
        device = get_device()
        with super().optim_context(model), torch.autocast(
                device, torch.bfloat16):
            yield


def use_mixed_precision(cfg: Config) -> None:
    """What ``--amp`` means: bfloat16, or scaled float16 where it is not.

    Args:
        cfg (Config): Changed in place.

    Raises:
        ValueError: The config has an optimiser wrapper of another kind.
    """
    plain = ('OptimWrapper', 'AmpOptimWrapper',
             'mmdensecl.BFloat16OptimWrapper')
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in plain:
        raise ValueError(f'--amp cannot replace optim_wrapper.type={wrapper}, '
                         f'only {", ".join(plain)}')
    if wrapper != 'OptimWrapper':
        return
    if has_bfloat16():
        cfg.optim_wrapper.type = 'mmdensecl.BFloat16OptimWrapper'
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
