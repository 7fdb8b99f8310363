"""Rotary positions (Su et al., arXiv 2104.09864), also scaled to longer sequences as in Llama 3.1 and 3.2."""

from collections.abc import Mapping
from math import pi
from typing import Any

import torch
from torch import Tensor

from models.precision import at_least_fp32

SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The types of scaling and the numbers that each type needs, with the names of Hugging Face's ``rope_scaling``."""


def rope_tables(
    tokens: int,
    head_dim: int,
    theta: float,
    like: Tensor,
    start: int = 0,
    scaling: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency for `tokens` positions from `start` on.

    Features i and i + head_dim / 2 have the frequency theta^(-2i / head_dim), changed by `scaling` (see `scaled`) if it
    is not None. Both tables are (tokens, 1, head_dim), on the device of `like`, in float32 (in float64 if `like` is in
    float64): in bfloat16, positions 256 and 257 would be the same number.
    """
    dtype, device = at_least_fp32(like.dtype), like.device
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)
    if scaling is not None:
        frequencies = scaled(frequencies, scaling)
    angles = torch.outer(torch.arange(start, start + tokens, dtype=dtype, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def scaled(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Lower the rotary ``frequencies``, in radians per position, so that a model can read longer sequences.

    By the ``rope_type`` of ``scaling``:

    linear  all frequencies are divided by ``factor`` (Chen et al., arXiv 2306.15595)
    llama3  as in Llama 3.1. With L = ``original_max_position_embeddings``, a frequency that turns fewer than
            ``low_freq_factor`` times in L positions is divided by ``factor``; a frequency that turns more than
            ``high_freq_factor`` times is unchanged. In between, the two are interpolated linearly in the number of
            turns.

    Args:
        scaling: Hugging Face's ``rope_scaling``, checked by `scaling_problems`.
    """
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def scaling_problems(scaling: Any) -> list[str]:
    """A message, with the fix, for each problem of ``model.rope_scaling``; [] if there is none, as for None."""
    if scaling is None:
        return []
    key = "model.rope_scaling"
    if not isinstance(scaling, Mapping):
        return [f"{key}={scaling} is not valid; set it to null or to a mapping such as {{rope_type:linear,factor:4.0}}"]
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        return [f"{key}: rope_type={kind} is unknown; choose {' or '.join(SCALINGS)}, or set {key}=null"]
    needed = SCALINGS[kind]
    problems = [f"{key}: {name} is missing; rope_type={kind} needs it" for name in needed if name not in scaling]
    unknown = [name for name in scaling if name not in ("rope_type", *needed)]
    problems += [f"{key}: rope_type={kind} has no {name}; leave it out" for name in unknown]
    given = {name: scaling[name] for name in needed if name in scaling}
    wrong = {name: value for name, value in given.items() if type(value) not in (int, float) or not value > 0}
    problems += [f"{key}: {name}={value} must be a number above 0" for name, value in wrong.items()]
    if not problems and kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        problems.append(f"{key}: low_freq_factor must be below high_freq_factor; swap them")
    return problems


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: rotate features i and i + head_dim / 2 of x (b, t, heads, head_dim) as a pair.

    cos and sin are from `rope_tables`. The result has the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
