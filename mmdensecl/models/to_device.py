# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Send a small tensor of the CPU without waiting for the device.

    Args:
        x (Tensor): On the CPU.
        device (torch.device): Where it goes.

    Returns:
        Tensor: On the device.
    """
    if device.type == 'cuda':
        x = x.pin_memory()  # else the CPU may wait until it has arrived
    return x.to(device, non_blocking=True)
