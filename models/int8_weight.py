"""A frozen weight in 8 bits: an int8 code for each element, and a step for each row (or column).

An element is its code times the step of its row (dim 0) or column (dim 1). Rows are selected and written back as units,
so that every write chooses a new step and clips nothing. Steps are powers of two: codes convert to bfloat16 without
error, and a row that comes back little changed mostly meets the grid that it left, so that its rounding error is as
small as its change.
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
        key: of the random numbers of stochastic rounding, whose mean is x; rounds to nearest when None.
        position: int64, the shape of ``x``, with a ``key``: each element's place in the stream of random numbers.

    Returns:
        Codes, int8 (…, m, n), and steps, float32 (…, m) for dim 0 and (…, n) for dim 1. The step of a row with an
        element that is not finite is NaN.
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
