"""Working precision and stochastic rounding."""

import torch
from torch import Tensor

from models.counter_rng import _shift_right, random_bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The dtypes that settings can name."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of norms, rotations and the loss."""
    return torch.promote_types(dtype, torch.float32)


def round_stochastically(x: Tensor, dtype: torch.dtype, key: Tensor | int, position: Tensor) -> Tensor:
    """``x`` as ``dtype``; to bfloat16 up or down at random, nearer neighbours likelier, so that the mean is x.

    Adds 16 random bits, drawn at ``position`` (int64, the shape of x), below the 16 that bfloat16 keeps of a float32.
    Other dtypes round to nearest. Values that are not finite stay so.
    """
    if dtype != torch.bfloat16 or x.dtype == dtype:
        return x.to(dtype)
    x = x.float()
    noise = _shift_right(random_bits(key, position), 48).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
