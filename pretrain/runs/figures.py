"""The project's plot style, and the figures of runs: charts against tokens or time, and coverage of rows.

Figures are 5.2 inches wide, so that their text is readable at 400 pixels.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from pretrain.runs.charts import UNITS, Chart
from pretrain.runs.records import RunRecords

WIDTH = 5.2  # inches
DPI = 200
# The palette of Okabe and Ito, whose colours are distinguishable with any colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY = "#888888"  # reference lines
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def new_figure(width: float = WIDTH, height: float = 3.1, grid: str = "both") -> Iterator[Figure]:
    """A context with an empty figure, in which drawing uses the project's style.

    Does not use pyplot, which keeps every figure and may need a display.

    Args:
        width: in inches, like ``height``.
        grid: both | x | y | none, the axes with grid lines.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": grid != "none", "axes.grid.axis": grid.replace("none", "both")}):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG whose bytes depend only on its content; returns the path."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def plot_chart(chart: Chart) -> Figure:
    """The chart as a figure, with its legend below it."""
    names = [line.group.name for line in chart.lines]
    columns = max(1, min(len(names), 3, 60 // (4 + max(map(len, names)))))
    with new_figure(height=2.9 + 0.17 * math.ceil(len(names) / columns)) as figure:
        axes = figure.add_subplot()
        colours = _colours(1 + max(line.group.number for line in chart.lines))
        for line in chart.lines:
            colour = colours[line.group.number]
            for x, y in line.logged:
                axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
            marker = "o" if chart.metric.markers else ""
            axes.plot(line.x, line.y, color=colour, label=line.group.name, marker=marker, markersize=3, linewidth=1.5)
        if chart.metric.log:
            _logarithmic(axes)
        if chart.metric.zero:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if chart.over == "tokens" else FuncFormatter(_plain))
        axes.set_xlabel(UNITS[chart.over])
        axes.set_title(f"{chart.title}, {chart.metric.unit}" + (f"\n{chart.data}" if chart.data else ""))
        figure.legend(loc="outside lower left", ncols=columns)
        return figure


def plot_coverage(run: RunRecords) -> Figure | None:
    """A figure of the share of each layer's rows ever selected, against tokens; None for a run that selects no rows."""
    layers, tokens, shares = run.coverage()
    if not layers:
        return None
    thin = max(1, len(tokens) // 400)
    with new_figure(height=min(7.0, max(2.0, 0.15 * len(layers))), grid="none") as figure:
        axes = figure.add_subplot()
        edges = np.append(0.0, tokens[::thin]) if len(tokens) else np.array([0.0, 1.0])
        image = axes.pcolormesh(edges, np.arange(len(layers) + 1), shares[:, ::thin], vmin=0, vmax=1, cmap="viridis")
        axes.invert_yaxis()
        _label_layers(axes, layers)
        axes.set_title("Share of each layer's rows that were ever trained")
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, format=FuncFormatter(lambda x, _: f"{x:.0%}"))
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def _colours(count: int) -> Any:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _label_layers(axes: Axes, layers: list[str]) -> None:
    """Name every layer if there is room, else the blocks."""
    short = [name.removeprefix("layers.").replace("self_attn.", "").replace("mlp.", "") for name in layers]
    blocks = [name.split(".")[0] for name in short]
    if len(layers) <= 40:
        ticks, labels = list(range(len(layers))), short
    else:
        ticks = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
        labels = [f"block {blocks[i]}" for i in ticks]
        every = max(1, len(ticks) // 12)
        ticks, labels = ticks[::every], labels[::every]
    axes.set_yticks([i + 0.5 for i in ticks], labels, fontsize=7)
