"""Whether two runs are bit-identical, with default settings and with deterministic algorithms."""

import os

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.learning import METHODS, learn


def run(bench: Bench, case: str) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at the first matmul
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        how = "train.deterministic=true" if deterministic else "default settings"
        for method in ("grass+muon", "adamw"):
            for dtype in ("float32", "bfloat16"):
                overrides = [*METHODS[method], f"train.dtype={dtype}", f"train.deterministic={deterministic}"]
                for compile in (False, True) if bench.on_gpu else (False,):
                    with bench.row(how=how, method=method, dtype=dtype, compiled=compile) as row:
                        one, two = (learn(overrides, bench.device, bench.dry, compile) for _ in range(2))
                        row["same_losses"] = one.losses == two.losses
                        row["same_parameters"] = all(map(same_bits, one.parameters, two.parameters))
                    torch.compiler.reset()


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Return whether two tensors are bit-identical, NaNs included."""
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
