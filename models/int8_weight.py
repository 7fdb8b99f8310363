"""A frozen weight in 8 bits: an int8 code for each element, and a step size for each row (or column).

An element is its code times the step size of its row (dim 0) or column (dim 1). Rows are always written completely, so
every write chooses a new step size and clips nothing. Step sizes are powers of two. So codes convert to bfloat16
without error, and a row that changes slightly mostly keeps its step size: rounding then adds only a small error.
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
        dim: 0 for a step size per row, 1 for a step size per column.
        key: None to round to nearest. A key (see models.counter_rng) to round up or down at random, so that the mean of
            the result is ``x``: an int, or int64 in a shape that broadcasts to ``x``.
        position: needed with a ``key``: int64, in the shape of ``x``: each element's position in the random tensor.

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
    """The weight (m, n) in ``dtype``, exact in bfloat16 and wider dtypes.

    Args:
        codes: int8 (m, n).
        step: float32 step sizes, (m,) of the rows for ``dim`` 0, (n,) of the columns for ``dim`` 1.
    """
    return codes.to(dtype).mul_(step.to(dtype).unsqueeze(1 - dim))


def full_weight(codes: Tensor, step: Tensor, rows: Tensor, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """As ``dequantise``, but with ``rows`` in the place of the rows (or for ``dim`` 1 columns) ``index``.

    Args:
        rows: (r, n) for ``dim`` 0, (m, r) for ``dim`` 1, any dtype.
        index: (r,) int64.
    """
    return dequantise(codes, step, dim, dtype).index_copy_(dim, index, rows.to(dtype))
