"""Memory of full-rank AdamW, 8-bit AdamW, GaLore and Grass at several sizes by the planner: a table and two plots.

python -m benchmarks.memory_table                # first estimates rows that docs/memory.jsonl lacks, and adds them
python -m benchmarks.memory_table --sizes 7b,13b

Settings: bfloat16, also for the rows and moments of Grass, one sequence of 256 tokens, no other option that reduces
memory. The planner extrapolates from simulations of few blocks. The simulation that would verify this is skipped:
tests/pretrain/planner/test_memory.py compares the extrapolation with complete simulations.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pretrain.config.compose import load
from pretrain.planner.extrapolate import simulate_all_blocks
from pretrain.planner.memory import GIB, highest
from pretrain.planner.simulate import COMPONENTS
from pretrain.runs.figures import COLOURS, GREY, new_figure, save

FOLDER = Path(__file__).resolve().parent.parent / "docs"
SETTINGS = [
    "train.dtype=bfloat16", "train.seq_len=256", "train.tokens_per_step=256", "train.micro_batch_size=1",
]  # fmt: skip
SIZES = ["1b", "3b", "7b", "13b"]
EVEN = ["optim.attention_weight=1", "optim.side=auto"]
METHODS = {
    "AdamW": ["optim=adamw"],
    "8-bit AdamW": ["optim=adamw8bit"],
    "GaLore, r = 256": ["optim=galore", "optim.rank=256"],
    # Rows and moments in bfloat16: the least memory of Grass.
    "Grass, r = 1024": ["optim.rank=1024", *EVEN, "optim.state_dtype=bfloat16"],
    "Grass, r = 256": ["optim.rank=256", *EVEN, "optim.state_dtype=bfloat16"],
    "Grass, r = 64": ["optim.rank=64", *EVEN, "optim.state_dtype=bfloat16"],
}
COMPARED = {  # methods of the overview, at the same rank, with their labels
    "AdamW": "AdamW, all weights", "GaLore, r = 256": "GaLore, rank 256", "Grass, r = 256": "Grass, rank 256",
}  # fmt: skip
# arXiv 2406.17660: LLaMA-13B, bf16, Adam, 256 tokens. Its "GB" are GiB, since it gives 24 for 13.0e9 weights.
PAPER = {"weights": 24, "gradients": 24, "optimizer_state": 49, "activations": 2}
PAPER_TOTAL = 102  # "at least"; the parts add up to 99

Row = dict[str, Any]


def estimated(size: str, method: str) -> Row:
    """Return a row: the bytes at the peak of a regular step by component, and in total at the peak of a refresh."""
    seen = simulate_all_blocks(load([f"model=llama_{size}", *METHODS[method], *SETTINGS]), verify=False)
    regular, refresh = highest(seen, "regular"), highest(seen, "refresh")
    held = {name: regular[name] for name in COMPONENTS}
    return {"size": size, "method": method, **held, "refresh": refresh.total()}


def known(path: Path) -> dict[tuple[str, str], Row]:
    """Return the rows of a file of ``estimated`` rows by size and method; none if the file is missing."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["size"], row["method"]): row for row in rows}


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Return a Markdown table in GiB. The last row has the numbers of the paper of Grass for AdamW at 13B."""
    held = [name for name in COMPONENTS if any(row.get(name) for row in rows.values())]
    heads = ["size", "method", *(name.replace("_", " ") for name in held), "a step", "a refresh"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows.values():
        parts = [row.get(name, 0) for name in held]
        numbers = [*parts, sum(parts), row["refresh"]]
        lines.append([row["size"], row["method"], *(f"{number / GIB:.2f}" for number in numbers)])
    reported = [str(PAPER.get(name, "")) for name in held]
    total = f"at least {PAPER_TOTAL} (the parts: {sum(PAPER.values())})"
    lines.append(["13b", "Adam, *reported by the paper*", *reported, total, ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(rows: dict[tuple[str, str], Row]) -> Figure:
    """Draw a panel per size, a bar per method and a colour per component; for 13B also the paper's Adam."""
    panels = {}
    for size in SIZES:
        bars = {method: row for (of, method), row in rows.items() if of == size}
        if size == "13b":
            bars = {"Adam, the paper's parts": {name: held * GIB for name, held in PAPER.items()}} | bars
        if bars:
            panels[f"LLaMA {size.upper()}, GiB by the planner"] = bars
    return stacked(panels)


def overview(rows: dict[tuple[str, str], Row]) -> Figure:
    """Draw AdamW, GaLore and Grass at rank 256 for 13B and 7B."""
    return stacked(
        {
            f"LLaMA {size.upper()}: GiB for a training step, by the planner": {
                name: rows[size, method] for method, name in COMPARED.items() if (size, method) in rows
            }
            for size in ("13b", "7b")
        },
        height=0.3,
    )


def stacked(panels: dict[str, dict[str, Row]], height: float = 0.25) -> Figure:
    """Draw a panel for each title, one below another, with a bar of ``height`` inches for each method.

    Args:
        panels: for each title and method, the bytes by component.
    """
    counts = [len(bars) + 1 for bars in panels.values()]
    with new_figure(height=0.8 + height * sum(counts) + 0.25 * len(panels), grid="x") as figure:
        for axes, (title, bars) in zip(
            figure.subplots(len(panels), 1, squeeze=False, height_ratios=counts)[:, 0], panels.items(), strict=True
        ):
            left = [0.0] * len(bars)
            for name, colour in zip(COMPONENTS, [*COLOURS, GREY], strict=False):
                widths = [row.get(name, 0) / GIB for row in bars.values()]
                if max(widths) > 0.02:
                    axes.barh(list(bars), widths, left=left, color=colour, height=0.7, label=name.replace("_", " "))
                left = [start + width for start, width in zip(left, widths, strict=True)]
            for place, total in enumerate(left):
                axes.text(total, place, f" {total:.1f}", va="center", fontsize=8)
            axes.set_title(title)
            axes.set_xlim(0, 1.1 * max(left))
            axes.invert_yaxis()
        named = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
        handles = {label: handle for pairs in named for handle, label in pairs}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(SIZES)
    parser.add_argument("--sizes", default=every, help=f"sizes to estimate if they are missing (default {every})")
    arguments = parser.parse_args()
    sizes = arguments.sizes.split(",")
    if unknown := sorted({*sizes} - {*SIZES}):
        parser.error(f"argument --sizes: {', '.join(unknown)}: choose from {every}")
    path = FOLDER / "memory.jsonl"
    rows = known(path)
    for key in [(size, method) for size in sizes for method in METHODS]:
        if key not in rows:
            rows[key] = estimated(*key)
            with path.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    ordered = {(size, m): rows[size, m] for size in SIZES for m in METHODS if (size, m) in rows}
    print(table(ordered))
    save(picture(ordered), FOLDER / "memory.png")
    save(overview(ordered), FOLDER / "memory_overview.png")


if __name__ == "__main__":
    main()
