"""The column "expected" of the results, and the source of each figure.

Targets are this project's own, set before anything ran on a GPU. The roofline is that of ``benchmarks.roofline``. It
counts only matmuls and the optimizer's bytes, so Grass gains less in a real step. Limits of the machine are shares of
NVIDIA's data sheet.
"""

from collections.abc import Callable
from functools import cache

from benchmarks.gpu.results import Row
from benchmarks.roofline import MACHINES, predict, work_of

# Targets: tokens/s of Grass with default settings, relative to AdamW's; bf16, compiled, 16k tokens per step.
AIMS = {"350m": 1.10, "1b": 1.20, "7b": 1.30}
ROOFLINES = {"350m": (128, 1024), "1b": (256, 1024), "7b": (512, 2048)}  # rank and sequence length in step_times
TOKENS = 16384
MOST_LAUNCHES = 2_000  # per step of Grass at 350m


@cache
def roofline(size: str) -> float:
    """Return the predicted tokens/s of Grass with AdamW on the rows, relative to AdamW's, on an H100."""
    rank, seq_len = ROOFLINES[size]
    (h100,) = (machine for machine in MACHINES if machine.name == "H100")
    adamw, grass = (predict(work_of(method, size, rank, seq_len), h100, TOKENS) for method in ("adamw", "grass"))
    return adamw / grass


def expected(module: str, row: Row) -> str:
    """Return the expected values of a row as a short text, or "" if nothing is expected or nothing was measured.

    ``module`` is the module of the row's section.
    """
    if module not in EXPECTED or {"fails", "lacks", "skipped"} & row.keys():
        return ""
    return EXPECTED[module](row)


def _machine(row: Row) -> str:
    if "tb_per_s" in row:
        return "H100: at least 2.7, 80 % of 3.35"
    return "H100: at least 600, 60 % of 989" if "tflop_per_s" in row else ""


def _attention(row: Row) -> str:
    return "H100: CUDNN_ATTENTION" if "chosen" in row else ""


def _decoding(row: Row) -> str:
    return "at most 5 ms above the second row" if "never" in row["lengths"] else ""


def _correctness(row: Row) -> str:
    if row["way"].startswith("bf16"):
        return "worst below 0.03"
    return f"worst below {'0.01: Muon iterates in bf16' if 'muon' in row['method'] else '0.001'}"


def _waits(row: Row) -> str:
    return "none" if row["case"] in ("adamw", "muon") else "at most 1 in a step that refreshes rows"


def _memory(row: Row) -> str:
    return f"at most {1.03 * row['planned_gib']:.2f} (3 % above the plan), of {row['card_gib']:g}"


def _step_time(row: Row) -> str:
    size = row["case"].partition("_")[0]
    if not row["method"].startswith("grass"):
        return ""
    roof = f"roofline {roofline(size):.2f}"
    return f"at least {AIMS[size]:.2f} ({roof})" if row["method"] == "grass" else roof


def _checkpoint(row: Row) -> str:
    return "blocked: at most a fifth of the first save, whose memory is reused" if row["save"] > 1 else ""


def _product(row: Row) -> str:
    if row["tokens"] == TOKENS:
        return "narrow at least 300 TFLOP/s" + (", forward at most 1.3 × that of 5504" if row["size"] == "1b" else "")
    return ""


def _kernels(row: Row) -> str:
    launches = f", at most {MOST_LAUNCHES:,} launches" if row["method"] == "grass" else ""
    return f"idle below 10 %{launches}"


def _determinism(row: Row) -> str:
    return "no guarantee" if row["how"] == "default settings" else "both equal"


EXPECTED: dict[str, Callable[[Row], str]] = {
    "machine": _machine, "exactness": lambda row: "none different", "attention": _attention, "decoding": _decoding,
    "correctness": _correctness, "waits": _waits, "memory": _memory, "step_times": _step_time,
    "checkpoints": _checkpoint, "products": _product, "kernels": _kernels, "determinism": _determinism,
}  # fmt: skip
