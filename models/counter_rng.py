"""Random numbers as a function of (key, position): the same on every device, on every rank and in a resumed run.

A key identifies a random tensor ("seed 0, sketch, step 200, layers.3.mlp.up_proj"); a position is the index of an
element in the complete tensor. There is no sequence, so no random number depends on earlier random numbers.
"""

import hashlib

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment, as the int64 that holds the same bits
_INVERSE = 0xF1DE83E19937733D - 2**64  # of _GAMMA modulo 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def key(seed: int, *name: str | int) -> int:
    """The key of a random tensor, in [0, 2**63): a hash of the run's ``seed`` and of the parts of the ``name``."""
    text = "\0".join(str(part) for part in (seed, *name))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _as_int64(number: int) -> int:
    """``number`` modulo 2**64, as the int64 with the same bits."""
    return (number + 2**63) % 2**64 - 2**63


def logical_shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift the int64 tensor ``x`` right by ``bits`` (1 … 63) and fill with zeros; ``>>`` would repeat the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(key: Tensor | int, position: Tensor) -> Tensor:
    """64 random bits for every position, by splitmix64 (Steele, Lea, Flood 2014).

    Args:
        key: names the random tensor: an int, or int64 in a shape that broadcasts to ``position``. Compiled code needs a
            tensor.
        position: int64, any shape.

    Returns:
        int64, in the shape of ``position``.
    """
    # Splitmix64 mixes (position + 1) γ + key, which modulo 2**64 is (position + 1 + key / γ) γ. The second form stops a
    # compiler from multiplying an index ``position`` by γ: Inductor would do so in 32 bits for a GPU, which Triton
    # refuses, and with wrong results in some vectorised loops for a CPU.
    start = key * _INVERSE + 1
    z = (position + (start if isinstance(start, Tensor) else _as_int64(start))) * _GAMMA
    z = (z ^ logical_shift_right(z, 30)) * _MIX_1
    z = (z ^ logical_shift_right(z, 27)) * _MIX_2
    return z ^ logical_shift_right(z, 31)


def random_unit(key: Tensor | int, position: Tensor) -> Tensor:
    """As ``random_bits``, but a uniform random number in [0, 1) for every position, in float32."""
    return logical_shift_right(random_bits(key, position), 40).float() * 2.0**-24


def random_signs(key: Tensor | int, rows: int, columns: int, like: Tensor) -> Tensor:
    """A (rows, columns) matrix of random signs, +1 or -1, with the dtype and device of ``like``.

    ``key`` names the random matrix: an int, or an int64 scalar tensor on that device.
    """
    position = torch.arange(rows * columns, device=like.device)
    sign_bit = logical_shift_right(random_bits(key, position), 63)
    return (1 - 2 * sign_bit).to(like.dtype).view(rows, columns)
