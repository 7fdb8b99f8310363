"""What full-rank AdamW, 8-bit AdamW, GaLore and Grass hold at several sizes, by the planner: a table and a picture.

python -m benchmarks.memory_table                # what docs/memory.jsonl lacks is estimated and added to it first
python -m benchmarks.memory_table --only 13b     # sizes

Bfloat16, one sequence of 256 tokens, no memory option on. Of the shortcut's three walks the third, which checks it, is
left out: tests/test_estimate.py holds the shortcut against full walks.
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
METHODS = {
    "AdamW": ["optim=adamw"],
    "8-bit AdamW": ["optim=adamw8bit"],
    "GaLore, r = 256": ["optim=galore", "optim.rank=256"],
    # With rows and moments in bfloat16, which is the least that Grass can do with.
    "Grass, r = 1024": ["optim.rank=1024", "optim.state_dtype=bfloat16"],
    "Grass, r = 256": ["optim.rank=256", "optim.state_dtype=bfloat16"],
    "Grass, r = 64": ["optim.rank=64", "optim.state_dtype=bfloat16"],
}
# arXiv 2406.17660: LLaMA-13B, bf16, Adam, 256 tokens, in its "GB", which 24 for 13.0e9 weights shows to be GiB.
PAPER = {"weights": 24, "gradients": 24, "optimizer_state": 49, "activations": 2}
PAPER_TOTAL = 102  # "at least"

Row = dict[str, Any]


def estimated(size: str, method: str) -> Row:
    """What a regular step holds at its peak by component, and the peak of a refresh, in bytes."""
    seen = simulate_all_blocks(load([f"model=llama_{size}", *METHODS[method], *SETTINGS]), verify=False)
    regular, refresh = highest(seen, "regular"), highest(seen, "refresh")
    held = {name: regular[name] for name in COMPONENTS}
    return {"size": size, "method": method, **held, "refresh": refresh.total()}


def known(path: Path) -> dict[tuple[str, str], Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["size"], row["method"]): row for row in rows}


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Markdown, in GiB; the paper's figures in the last row."""
    held = [name for name in COMPONENTS if any(row.get(name) for row in rows.values())]
    heads = ["size", "method", *(name.replace("_", " ") for name in held), "a step", "a refresh"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows.values():
        parts = [row.get(name, 0) for name in held]
        numbers = [*parts, sum(parts), row["refresh"]]
        lines.append([row["size"], row["method"], *(f"{number / GIB:.2f}" for number in numbers)])
    reported = [str(PAPER.get(name, "")) for name in held]
    lines.append(["13b", "Adam, *reported by the paper*", *reported, f"at least {PAPER_TOTAL}", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(rows: dict[tuple[str, str], Row]) -> Figure:
    """A panel a size, a bar a method, a colour a component; the paper's beside the 13B."""
    sizes = [size for size in SIZES if any(of == size for of, _ in rows)]
    with new_figure(height=4.6, grid="y") as figure:
        for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
            bars = {method: row for (of, method), row in rows.items() if of == size}
            if size == "13b":
                bars = {"Adam, the paper's": {name: held * GIB for name, held in PAPER.items()}} | bars
            bottom = [0.0] * len(bars)
            for name, colour in zip(COMPONENTS, [*COLOURS, GREY], strict=False):
                heights = [row.get(name, 0) / GIB for row in bars.values()]
                if max(heights) > 0.02:
                    axes.bar(list(bars), heights, bottom=bottom, color=colour, width=0.7, label=name.replace("_", " "))
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            axes.set_title(f"LLaMA {size.upper()}")
            axes.tick_params(axis="x", rotation=90)
            axes.set_ylabel("GiB")
        named = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
        handles = {label: handle for pairs in named for handle, label in pairs}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=SIZES, help="sizes to estimate if they are missing")
    arguments = parser.parse_args()
    path = FOLDER / "memory.jsonl"
    rows = known(path)
    for key in [(size, method) for size in arguments.only for method in METHODS]:
        if key not in rows:
            rows[key] = estimated(*key)
            with path.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
    ordered = {(size, m): rows[size, m] for size in SIZES for m in METHODS if (size, m) in rows}
    print(table(ordered))
    save(picture(ordered), FOLDER / "memory.png")


if __name__ == "__main__":
    main()
