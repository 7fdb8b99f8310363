"""A frozen weight in 8 bits: an int8 code for each element, and a step size for each row (or column).

An element is its code times the step size of its row (dim 0) or column (dim 1). Rows are always written completely, so
every write chooses a new step size and clips nothing. Step sizes are powers of two: codes convert to bfloat16 without
error, and a slightly changed row mostly gets its previous step size, so its rounding error is as small as its change.
"""

import torch
from torch import Tensor

from models.counter_rng import random_unit

LARGEST = 127


def quantise(
    x: Tensor, dim: int, key: Tensor | int | None = None, position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` (…, m, n), rounding to the nearest code or stochastically.

    Args:
        dim: 0 for a step per row, 1 for a step per column.
        key: seeds the random numbers of stochastic rounding, which is unbiased (its mean is x). None: round to nearest.
        position: int64, in the shape of ``x``, needed with a ``key``: each element's position in the random stream.

    Returns:
        Codes, int8 (…, m, n), and step sizes, float32 (…, m) for dim 0 and (…, n) for dim 1. The step size of a row
        with a non-finite element is NaN.
    """
    x = x.float()
    other = -1 if dim == 0 else -2
    largest = x.abs().amax(other)
    step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / LARGEST).exponent)
    x = x / step.unsqueeze(other)
    if key is None:
        codes = x.round()
    else:
        assert position is not None
        codes = x.floor()
        codes += random_unit(key, position) < x - codes
    return codes.to(torch.int8), torch.where(largest.isfinite(), step, torch.nan)


def dequantise(codes: Tensor, step: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The weight (m, n) in ``dtype``, exact in bfloat16 and wider, from codes (m, n) and steps (m,) or (n,)."""
    return codes.to(dtype).mul_(step.to(dtype).unsqueeze(1 - dim))


def full_weight(codes: Tensor, step: Tensor, rows: Tensor, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The weight (m, n) in ``dtype`` with ``rows`` at ``index`` (r,): (r, n) for dim 0, (m, r) for dim 1."""
    return dequantise(codes, step, dim, dtype).index_copy_(dim, index, rows.to(dtype))
