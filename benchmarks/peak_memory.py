"""Peak resident memory of the same run with several methods: ``python -m benchmarks.peak_memory [--json]``.

Each method makes three real steps on the CPU in a separate process: micro-batch 1 × 256, fp32. The steps include a
refresh of the rows, or of GaLore's projection. benchmarks.real_steps describes the measurement.
"""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.real_steps import KINDS, measure
from pretrain.config.compose import load
from pretrain.setup.checks import check

OPTIONS = [
    "optim.side=columns", "optim.share_index=true", "optim.stagger=auto", "train.lean_activations=true",
    "train.loss_chunk_tokens=64", "train.step_in_backward=true", "optim.clip=0",
]  # fmt: skip
METHODS = {
    "adamw": ["optim=adamw"],
    "adamw8bit": ["optim=adamw8bit"],
    "galore": ["optim=galore"],  # computes its projections in the first step
    "grass": ["optim=grass"],
    "grass+options": ["optim=grass", *OPTIONS],
}
COMPARED = ["adamw", "galore", "grass", "grass+options"]


def peak(method: str, size: str, rank: int) -> dict[str, Any]:
    """Return a method's row: its overrides, its peak of resident bytes, and the resident bytes before it ran."""
    overrides = [f"model=llama_{size}", "train.tokens_per_step=256", *METHODS[method]]
    if method in ("galore", "grass", "grass+options"):
        overrides.append(f"optim.rank={rank}")
    check(load(overrides))
    found = measure("resident", overrides)
    baseline = found.pop("baseline")
    return {
        "method": method, "peak_bytes": baseline + max(found.values()), "baseline_bytes": baseline, "steps": len(KINDS),
        "overrides": overrides,
    }  # fmt: skip


def print_table(rows: list[dict[str, Any]]) -> None:
    above = {row["method"]: row["peak_bytes"] - row["baseline_bytes"] for row in rows}
    references = [method for method in ("adamw", "galore") if method in above]
    table = Table("method", "MiB above the baseline", *(f"relative to {method}" for method in references))
    for method, size in above.items():
        table.add_row(method, f"{size / 2**20:,.0f}", *(f"{size / above[other]:.3f}" for other in references))
    Console(highlight=False, width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350m", help="model size: nano, 60m, … (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="rank of Grass and GaLore (default: %(default)s)")
    known = ", ".join(METHODS)
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"from {known} (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        parser.error(f"--methods: no such method: {', '.join(unknown)}")
    rows = [peak(method, arguments.size, arguments.rank) for method in methods]
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
