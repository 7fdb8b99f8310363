"""How the time and memory of a step grow with rank, width, layers and sequence length: slopes on log-log axes.

python -m benchmarks.growth [--json] [--plot growth.png]
python -m benchmarks.growth --written docs/growth.json --plot docs/growth.png      # from the output of an earlier run

The model is a small LLaMA with a vocabulary of 256. One size at a time takes several values (VALUES); the other sizes
keep one value (BASE). Seconds are medians of CPU time on one thread. Bytes are counted, not measured: the optimizer
state, and the planner's peak of a step. A slope of 1 means that time or memory doubles when the size doubles. The fold
(which writes the trained rows back into the weights) and the refresh (which selects new rows) must not grow faster than
rank × width, so their slopes with the rank and with the width are at most 1.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import linear_regression, median
from timeit import repeat
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.steps import Steps, configuration
from pretrain.distributed.world import World
from pretrain.planner.block_layout import layout_of
from pretrain.planner.simulate import MODEL, simulate
from pretrain.runs.figures import GREY, new_figure, save

VALUES = {
    "rank": (32, 64, 128, 256), "width": (256, 512, 1024), "layers": (2, 4, 8), "sequence": (128, 256, 512),
}  # fmt: skip
BASE = {"rank": 64, "width": 512, "layers": 4, "sequence": 256}
SECONDS = ("step_s", "fold_s", "refresh_s", "optimizer_s")
MEASURED = (*SECONDS, "state_bytes", "peak_bytes")


def overrides_of(rank: int, width: int, layers: int, sequence: int) -> list[str]:
    """Return the overrides for a model of this shape whose blocks all refresh in every second step."""
    return [
        "model=llama_nano", f"model.hidden_size={width}", f"model.intermediate_size={width // 256 * 688}",
        f"model.num_hidden_layers={layers}", f"model.num_attention_heads={width // 64}", "model.vocab_size=256",
        "data.vocab_size=256", f"train.seq_len={sequence}", f"train.tokens_per_step={2 * sequence}",
        # All blocks refresh together, in every second step.
        "optim.stagger=false", "optim.refresh_every=2", "optim.probe_steps=1", f"optim.rank={rank}",
    ]  # fmt: skip


def measure(shape: dict[str, int], pairs: int) -> dict[str, Any]:
    """Return ``shape`` with the seconds of a step and its parts, and the bytes of optimizer state and peak.

    ``step_s`` and ``optimizer_s`` are those of a regular step. The optimizer step includes the fold, which is also
    timed separately.

    Args:
        shape: the arguments of ``overrides_of``.
        pairs: the number of pairs of a regular step and a step with a refresh to time.
    """
    config, _ = configuration("grass", shape["rank"], overrides_of(**shape))
    steps = Steps(config, World(rank=0, size=1, device=torch.device("cpu")), clock=time.process_time)
    made = iter(steps)
    timed = [next(made) for _ in range(2 * pairs + 2)][2:]
    # Every second step ends with a refresh. Refreshing steps are those that spend more time after the fold.
    regular, refreshing = sorted((timed[::2], timed[1::2]), key=lambda some: sum(step.choosing_s for step in some))
    grass = steps.optim.grass
    assert grass is not None
    layers = grass.layers.values()
    folds = repeat(lambda: [layer.fold() for layer in layers], timer=time.process_time, number=1, repeat=pairs + 2)
    state = [t for states in steps.optim.optimizer.state.values() for t in states.values() if torch.is_tensor(t)]
    seen = simulate(config, layout_of(config))
    peaks = [sum(held.values()) for stretch, held in seen.items() if stretch != MODEL]
    return shape | {
        "step_s": median(step.total_s for step in regular), "optimizer_s": median(step.optimizer_s for step in regular),
        "refresh_s": median(step.choosing_s for step in refreshing), "fold_s": median(folds[2:]),
        "state_bytes": sum(t.numel() * t.element_size() for t in state), "peak_bytes": max(peaks),
    }  # fmt: skip


def measure_all(pairs: int) -> dict[str, Any]:
    """Return the ``measure`` of each value of each size as "rows", and "slopes" by size."""
    torch.set_num_threads(1)
    rows, slopes = [], {}
    for name, values in VALUES.items():
        of_this = [measure(BASE | {name: value}, pairs) for value in values]
        slopes[name] = {what: slope(list(values), [row[what] for row in of_this]) for what in MEASURED}
        rows += [{"varied": name, **row} for row in of_this]
    return {"rows": rows, "slopes": slopes}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the seconds against each size on log-log axes. A dotted line shows growth in proportion to the size."""
    with new_figure(height=4.4) as figure:
        axes = figure.subplots(2, 2, sharey=True)
        for axis, name in zip(axes.flat, VALUES, strict=True):
            of_this = [row for row in rows if row["varied"] == name]
            values = [row[name] for row in of_this]
            for what in SECONDS:
                axis.loglog(values, [row[what] for row in of_this], marker="o", markersize=3, label=what[:-2])
            least = min(of_this[0][what] for what in SECONDS)
            axis.loglog(values, [least * value / values[0] for value in values], ":", color=GREY, label="in proportion")
            axis.set_xticks(values, map(str, values))
            axis.minorticks_off()
            axis.set_xlabel(name)
        for axis in axes[:, 0]:
            axis.set_ylabel("seconds")
        figure.suptitle("Time of a step and its parts as one size grows", x=0.01, ha="left", fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, file)


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of the least-squares line through log y against log x."""
    return linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps with and without a refresh (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--written", type=Path, metavar="JSON", help="show this output of --json instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a plot of the seconds")
    arguments = parser.parse_args()
    found = json.loads(arguments.written.read_text()) if arguments.written else measure_all(arguments.pairs)
    if arguments.plot:
        plot(found["rows"], arguments.plot)
    if arguments.json:
        print(json.dumps(found))
        return
    table = Table("grows with", *(what.replace("_", " ") for what in MEASURED), title="slopes")
    for name, slopes in found["slopes"].items():
        table.add_row(name, *(f"{slopes[what]:.2f}" for what in MEASURED))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
