"""Stochastic rounding to bfloat16."""

import torch
from torch import Tensor

from models.counter_rng import logical_shift_right, random_bits


def round_stochastically(x: Tensor, dtype: torch.dtype, key: Tensor | int, position: Tensor) -> Tensor:
    """Convert ``x`` to ``dtype``: to bfloat16 up or down at random, so that the mean is x; to others to nearest.

    Adds a random 16-bit number to the lower half of a float32 and keeps the upper half, so that the nearer neighbour is
    more likely.
    Non-finite values stay non-finite.

    Args:
        x: floating point, any shape.
        key: the key of the random numbers, see models.counter_rng.
        position: int64, in the shape of ``x``: each element's position in the random stream.
    """
    if dtype != torch.bfloat16 or x.dtype == dtype:
        return x.to(dtype)
    x = x.float()
    noise = logical_shift_right(random_bits(key, position), 48).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
