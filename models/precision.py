"""Working precision and stochastic rounding."""

import torch
from torch import Tensor

from models.counter_rng import logical_shift_right, random_bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The dtypes that settings can name."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of norms, rotations and the loss."""
    return torch.promote_types(dtype, torch.float32)


def round_stochastically(x: Tensor, dtype: torch.dtype, key: Tensor | int, position: Tensor) -> Tensor:
    """``x`` in ``dtype``: to bfloat16 rounded up or down at random so that the mean is x, else rounded to nearest.

    Adds 16 random bits below the 16 that bfloat16 keeps of a float32, so that the nearer neighbour is likelier. Values
    that are not finite stay so.

    Args:
        x: floating point, any shape.
        key: of the random numbers, see models.counter_rng.
        position: int64, the shape of ``x``: each element's place in the stream of random numbers.
    """
    if dtype != torch.bfloat16 or x.dtype == dtype:
        return x.to(dtype)
    x = x.float()
    noise = logical_shift_right(random_bits(key, position), 48).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
