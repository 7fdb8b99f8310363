"""Copies from host memory to a device that do not wait for work on the device."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` from host memory to ``device``, unless it is there already.

    Copies to a GPU go through pinned memory, because a copy from pageable memory waits for the GPU.
    """
    if tensor.device == device:
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
