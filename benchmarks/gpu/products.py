"""Time of the narrow weight-gradient matmuls of Grass, compared with the full matmul and with the gather before them.

Also compares 5461 features (the usual 1b) with 5504, a multiple of 128.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench

SIZES = {"350m": (1024, 2736), "1b": (2048, 5461), "1b, 5504": (2048, 5504), "7b": (4096, 11008)}
TOKENS = (4096, 16384)
SHARES = (8, 4)  # 1/8 and 1/4 of the smaller side are selected


def run(bench: Bench, case: str) -> None:
    for size, (hidden, intermediate) in SIZES.items():
        for tokens in (64,) if bench.dry else TOKENS:
            for m, n in ((hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
                if bench.dry:
                    m, n = m // 32, n // 32
                with bench.row(size=size, tokens=tokens, out=m, into=n) as row:
                    row |= measure(bench, tokens, m, n)


def measure(bench: Bench, tokens: int, m: int, n: int) -> dict[str, float]:
    """Return the times of the matmuls of a linear layer from ``n`` to ``m`` features.

    They are milliseconds, and TFLOP/s of the weight gradients.
    """
    dy, x, w = (torch.randn(shape, device=bench.device).bfloat16() for shape in ((tokens, m), (tokens, n), (m, n)))
    whole = bench.ms(lambda: dy.T @ x)
    found = {
        "forward_ms": bench.ms(lambda: x @ w.T), "input_gradient_ms": bench.ms(lambda: dy @ w), "whole_ms": whole,
        "whole_tflop_per_s": 2 * tokens * m * n / whole / 1e9,
    }  # fmt: skip
    # As in models.grass_linear: rows if m <= n, else columns.
    selected, other = (dy, x) if m <= n else (x, dy)
    for share in SHARES:
        rank = min(m, n) // share
        index = torch.randperm(min(m, n), device=bench.device)[:rank].sort().values
        part = selected.index_select(1, index)
        narrow = bench.ms(partial(_gradient, part, other, m <= n))
        found |= {
            f"narrow_{share}_ms": narrow, f"gather_{share}_ms": bench.ms(partial(selected.index_select, 1, index)),
            f"narrow_{share}_tflop_per_s": 2 * tokens * rank * max(m, n) / narrow / 1e9,
        }  # fmt: skip
    return found


def _gradient(part: Tensor, other: Tensor, rows: bool) -> Tensor:
    return part.T @ other if rows else other.T @ part
