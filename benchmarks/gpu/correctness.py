"""Whether 20 training steps on text have the same losses and chosen rows on the GPU as on the CPU in float32."""

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.learning import METHODS, Learned, learn

# (name, overrides, whether blocks are compiled)
WAYS = (
    ("fp32", ["train.dtype=float32"], False),
    ("fp32, compiled", ["train.dtype=float32"], True),
    ("bf16", ["train.dtype=bfloat16"], False),
    ("bf16, compiled", ["train.dtype=bfloat16"], True),
)


def run(bench: Bench, case: str) -> None:
    for method, overrides in METHODS.items():
        cpu = learn(overrides, torch.device("cpu"), bench.dry)
        for way, more, compile in WAYS:
            if compile and not bench.on_gpu:
                bench.add(method=method, way=way, skipped="needs a GPU")
                continue
            with bench.row(method=method, way=way) as row:
                row |= compared(learn([*overrides, *more], bench.device, bench.dry, compile), cpu)
            torch.compiler.reset()


def compared(here: Learned, cpu: Learned) -> dict[str, object]:
    """Return the first and last loss of ``here``, the largest difference from ``cpu``'s, and how well their rows agree.

    ``same_rows`` is the number of layers that chose exactly the CPU's rows at the end. ``common_rows`` is the share of
    all chosen rows that the CPU chose too. Rows may differ because rounding decides between nearly equal scores.
    """
    same = sum(torch.equal(here.rows[name], index) for name, index in cpu.rows.items())
    common = [torch.isin(here.rows[name], index) for name, index in cpu.rows.items()]
    distances = [abs(a - b) for a, b in zip(here.losses, cpu.losses, strict=True)]
    return {
        "compiled": here.compiled, "first": here.losses[0], "last": here.losses[-1], "cpu_last": cpu.losses[-1],
        "worst": max(distances), "same_rows": same, "layers": len(cpu.rows),
        "common_rows": torch.cat(common).double().mean().item() if common else None,
    }  # fmt: skip
