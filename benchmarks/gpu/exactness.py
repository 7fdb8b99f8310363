"""Values that must be the same on every device: counter-based random bits, stochastic rounding, powers of two."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import NEEDS_GPU, Bench
from models import counter_rng
from models.stochastic_rounding import round_stochastically

KEY = 2**62 + 12345
CPU = torch.device("cpu")


def run(bench: Bench, case: str) -> None:
    many = 1_000 if bench.dry else 100_000
    position = torch.arange(many) * 7919
    values = torch.randn(many, generator=torch.Generator().manual_seed(0))
    exponents = torch.arange(-125, 127, dtype=torch.int32)

    def bits(device: torch.device) -> Tensor:
        return counter_rng.random_bits(KEY, position.to(device))

    def rounding(device: torch.device) -> Tensor:
        return round_stochastically(values.to(device), torch.bfloat16, KEY, position.to(device))

    def powers(device: torch.device) -> Tensor:
        return torch.ldexp(torch.ones(len(exponents), device=device), exponents.to(device))

    for what, compute in (("random bits", bits), ("stochastic rounding", rounding), ("powers of two", powers)):
        compare(bench, what, compute(CPU), partial(compute, bench.device))
    for dtype in (torch.float32, torch.bfloat16):
        _signs(bench, dtype)


def _signs(bench: Bench, dtype: torch.dtype) -> None:
    """Compare the random signs of a sketch, eager and compiled, at the shape of 350m's down projection."""
    shape = (48, 4) if bench.dry else (2736, 16)
    what = f"random signs, {str(dtype).removeprefix('torch.')}"

    def signs(key: Tensor, like: Tensor) -> Tensor:
        return counter_rng.random_signs(key, *shape, like)

    key, like = torch.full((), KEY), torch.ones(1, dtype=dtype)
    expected, here = signs(key, like), (key.to(bench.device), like.to(bench.device))
    compare(bench, what, expected, partial(signs, *here))
    if bench.on_gpu:
        compare(bench, f"{what}, compiled", expected, partial(torch.compile(signs), *here))
    else:
        bench.add(what=f"{what}, compiled", skipped=NEEDS_GPU)


def compare(bench: Bench, what: str, expected: Tensor, compute: Callable[[], Tensor]) -> None:
    """Report the number of elements in which ``compute()`` differs from ``expected``, which the CPU computed."""
    with bench.row(what=what, elements=expected.numel()) as row:
        different = int((compute().cpu() != expected).sum())
        row |= {"equal": different == 0, "different": different}
