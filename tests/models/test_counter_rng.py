"""Random bits against splitmix64 in Python's own integers, and the same bits from compiled code."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from models.counter_rng import random_bits, random_signs


def splitmix64(state: int) -> int:
    """The output for a state that has been incremented already, from the algorithm's publication."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, 12345, 2**62 + 12345, 2**63 - 1])
def test_bits_are_those_of_splitmix64(key):
    positions = [0, 1, 2, 1000, 2**31, 2**40 + 7]
    wanted = [splitmix64(key + (position + 1) * 0x9E3779B97F4A7C15) for position in positions]
    for form in (key, torch.full((), key)):
        bits = random_bits(form, torch.tensor(positions))
        assert [b % 2**64 for b in bits.tolist()] == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_signs_are_those_of_eager_code(dtype):
    torch._dynamo.reset()
    key, like = torch.full((), 2**62 + 12345), torch.ones(1, dtype=dtype)
    compiled, code = run_and_get_code(torch.compile(lambda k, x: random_signs(k, 2736, 16, x)), key, like)
    assert torch.equal(compiled, random_signs(key, 2736, 16, like))
    # An index times the large constant is what Triton refuses on a GPU: see random_bits.
    assert not re.search(r"7046029254386353131L?\)?\s*\*\s*[xr]\d", "".join(code))
