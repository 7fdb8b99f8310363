"""Stochastic rounding to bfloat16."""

import torch
from torch import Tensor

from models.counter_rng import logical_shift_right, random_bits


def round_stochastically(x: Tensor, dtype: torch.dtype, key: Tensor | int, position: Tensor) -> Tensor:
    """Convert ``x`` to ``dtype``. To bfloat16, round up or down at random, so that the mean of the result is ``x``.

    A random 16-bit number is added to the lower half of each float32, and the upper half is kept, so the nearer
    neighbour is more likely. Other dtypes are rounded to nearest. Non-finite values stay non-finite.

    Args:
        x: floating point, any shape.
        dtype: the dtype of the result; if it is that of ``x``, ``x`` is returned.
        key: names a random tensor, see models.counter_rng: an int, or int64 in a shape that broadcasts to ``x``.
        position: int64, in the shape of ``x``: each element's position in the random tensor.
    """
    if dtype != torch.bfloat16 or x.dtype == dtype:
        return x.to(dtype)
    x = x.float()
    noise = logical_shift_right(random_bits(key, position), 48).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
