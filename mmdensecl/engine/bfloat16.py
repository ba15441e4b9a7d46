# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Mixed precision in bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper

from mmdensecl.registry import OPTIM_WRAPPERS


def native_bfloat16() -> tuple[bool, str]:
    """Check whether the device multiplies bfloat16 in hardware.

    Emulated, it is several times slower than float32 on a CPU; in hardware it
    is faster.

    Returns:
        Whether it does, and what decided, for the log.
    """
    if get_device() == 'cuda':
        found = torch.cuda.is_bf16_supported(including_emulation=False)
        return found, torch.cuda.get_device_name()
    units = [
        name
        for name, check in (
            ('AMX', '_is_amx_tile_supported'),
            ('AVX512-BF16', '_is_avx512_bf16_supported'),
        )
        if getattr(torch.cpu, check, lambda: False)()
    ]
    return bool(units), f'a CPU with {units[0]}' if units else (
        'a CPU without AMX or AVX512-BF16'
    )


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16.

    bfloat16 has the range of float32, so unlike mmengine's
    `AmpOptimWrapper` it scales no loss: nothing waits for the GPU to say
    whether a gradient overflowed, the checkpoints are those of
    `OptimWrapper`, and it also runs on a CPU.

    Args:
        *args: Of mmengine's `OptimWrapper`.
        enabled: Whether bfloat16 is used; 'auto' uses it where the device
            multiplies it in hardware, and says what it decided.
        **kwargs: Of mmengine's `OptimWrapper`.

    Raises:
        ValueError: `enabled` is neither a bool nor 'auto'.
        RuntimeError: It is True and the GPU has no bfloat16.
    """

    def __init__(self, *args, enabled: bool | str = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if enabled not in (True, False, 'auto'):
            raise ValueError(
                f"enabled must be True, False or 'auto', got {enabled!r}"
            )
        native, device = native_bfloat16()
        if enabled == 'auto':
            precision = 'bfloat16' if native else 'float32'
            print_log(f'Precision: {precision} (auto, on {device})', 'current')
            enabled = native
        elif enabled and not native and get_device() == 'cuda':
            raise RuntimeError(
                f'{device} has no bfloat16. Train in float16 with '
                '--cfg-options optim_wrapper.type=AmpOptimWrapper'
            )
        self.enabled = bool(enabled)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Where the forward pass of a step runs."""
        with (
            super().optim_context(model),
            torch.autocast(get_device(), torch.bfloat16, enabled=self.enabled),
        ):
            yield


def use_mixed_precision(cfg: Config, auto: bool = False) -> None:
    """Set what `--amp` means: bfloat16, or scaled float16 where it is not.

    Args:
        cfg: Changed in place.
        auto: Whether to use bfloat16 where it is fast and else float32, `--amp
            auto`.

    Raises:
        ValueError: The config has an optimiser wrapper of another kind.
    """
    ours = 'mmdensecl.BFloat16OptimWrapper'
    plain = ('OptimWrapper', 'AmpOptimWrapper', ours)
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper not in plain:
        raise ValueError(
            f'--amp cannot replace optim_wrapper.type={wrapper}, '
            f'only {", ".join(plain)}'
        )
    if auto:
        cfg.optim_wrapper.update(type=ours, enabled='auto')
    elif wrapper == ours:
        cfg.optim_wrapper.enabled = True
    elif wrapper == 'OptimWrapper':
        if get_device() != 'cuda' or native_bfloat16()[0]:
            cfg.optim_wrapper.type = ours
        else:
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
