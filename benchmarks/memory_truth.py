"""Compare the planner's peaks with real steps on the CPU: ``python -m benchmarks.memory_truth [--json] [case …]``.

Each case is measured twice, in separate processes: by allocator events and as resident memory, see
benchmarks.real_steps. The planner uses neither measurement.
"""

import argparse
import itertools
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.real_steps import measure
from pretrain.config.compose import load
from pretrain.planner.memory import estimate

SIZES = {
    "nano": ["model=llama_nano", "train.tokens_per_step=4096"],
    "130m": ["model=llama_130m", "train.tokens_per_step=512"],
}
METHODS = {
    "adamw": ["optim=adamw"],
    "grass": ["optim=grass", "optim.refresh_every=3"],  # the third step ends with the refresh
    "galore": ["optim=galore", "optim.update_gap=2"],
}
BF16 = [*SIZES["nano"], "train.dtype=bfloat16"]
CASES = {
    f"{size} {method} {mode}": [*SIZES[size], *METHODS[method], f"train.checkpointing={mode}"]
    for size, method, mode in itertools.product(SIZES, METHODS, ("none", "full"))
} | {f"nano {method} bf16": [*BF16, *METHODS[method]] for method in ("adamw", "grass")}
MIB = 2**20


def compare(case: str) -> list[dict[str, Any]]:
    """Return the planned, allocated and resident peak bytes of a case, for a regular and for a refresh step."""
    found, _ = estimate(load(CASES[case]))
    planned = {"regular": found.peak_bytes, "refresh": found.refresh_peak_bytes}
    allocated, resident = (measure(way, CASES[case]) for way in ("events", "resident"))
    return [
        {"case": case, "step": kind, "planned": planned[kind], "allocated": allocated[kind], "resident": resident[kind]}
        for kind in planned
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("case", "step", "planned, MiB", "allocated", "resident", "planned / allocated", "planned / resident")
    for row in rows:
        sizes = [row[way] for way in ("planned", "allocated", "resident")]
        shares = [f"{row['planned'] / size:.3f}" for size in sizes[1:]]
        table.add_row(row["case"], row["step"], *(f"{size / MIB:,.1f}" for size in sizes), *shares)
    Console(highlight=False, width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"cases, from {', '.join(map(repr, CASES))} (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    rows = [row for case in arguments.cases or CASES for row in compare(case)]
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
