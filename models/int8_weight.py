"""A frozen weight in eight bits: an int8 code for each element, and a step for each row (or column) of the weight.

An element is its code times the step of the row (dim 0) or column (dim 1) it is in: of what is selected and written
back as a whole, so that every write chooses its steps anew and nothing is clipped. Steps are powers of two. So codes
become bfloat16 without an error, and a row that comes back a little changed mostly meets the grid that it left: its
rounding is as small as its change.
"""

import torch
from torch import Tensor

from models.counter_rng import random_unit

LARGEST = 127


def quantise(
    x: Tensor, dim: int, key: Tensor | int | None = None, position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes, int8 of the shape of ``x`` (…, m, n), and steps, float32 (…, m) for dim 0 and (…, n) for dim 1.

    With a ``key`` an element goes to the code below or above at random, drawn at its ``position`` (int64, the shape of
    x), the nearer one likelier, so that the mean is x; without one it goes to the nearest. Of a row with an element
    that is not finite, no element stays so.
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
    """The weight (m, n) in ``dtype``: exact in bfloat16 and wider."""
    return codes.to(dtype).mul_(step.to(dtype).unsqueeze(1 - dim))


def whole(codes: Tensor, step: Tensor, rows: Tensor, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The weight (m, n) in ``dtype`` with ``rows``, (r, n) or for dim 1 (m, r), where ``index`` says."""
    return dequantise(codes, step, dim, dtype).index_copy_(dim, index, rows.to(dtype))
