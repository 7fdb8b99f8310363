"""The project's plot style, and the figures of runs: curves against tokens or time, and coverage of rows.

The figures of runs are drawn at two widths, for a page and for a telephone, with letters of the same size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from pretrain.runs.records import RunRecords, Series

WIDTHS = {"wide": 10.4, "narrow": 3.7}  # inches; 1040 and 370 pixels on the page
DPI = 200
MEMORY = 1 / 25  # of the moving average, as a share of all points
# The palette of Okabe and Ito, which people with any colour vision can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY = "#888888"  # lines that the data are compared with
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
def new_figure(width: float = WIDTHS["wide"], height: float = 4.4, grid: str = "both") -> Iterator[Figure]:
    """An empty figure of this size in inches; what is drawn inside the context gets the project's style.

    It is made without pyplot, which keeps every figure and may look for a screen.

    Args:
        grid: both | x | y | none, the axes with grid lines.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": grid != "none", "axes.grid.axis": grid.replace("none", "both")}):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG whose bytes depend only on what is drawn; returns its path."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def smooth(values: Series) -> Series:
    """The exponential moving average (n,) of values (n,), corrected for its start: the first value stays the same."""
    keep = 1 - 1 / (1 + MEMORY * len(values))
    average, weight, result = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result[i] = average / weight
    return result


def plot_curves(
    groups: dict[str, list[RunRecords]], key: str, label: str, width: str, over: str = "tokens", log: bool = False,
    smoothed: bool = False, marker: str = "", scale: float = 1.0, from_zero: bool = False,
) -> Figure | None:  # fmt: skip
    """The metric ``key`` against ``over``: for each group the mean of its seeds, and a band from the least to the most.

    Args:
        groups: runs that differ only in their seed, by the name to show.
        width: a key of WIDTHS.
        over: tokens | minutes.
        log: whether both axes are logarithmic, which leaves out the point before the first step.
        smoothed: whether to draw moving averages; the points stay visible behind those of up to four groups.
        scale: factor of the metric.

    Returns:
        None if no run has logged ``key``.
    """
    log = log and any((run.series(key, over)[0] > 0).any() for runs in groups.values() for run in runs)
    with new_figure(WIDTHS[width], WIDTHS[width] * (0.42 if width == "wide" else 0.8)) as figure:
        axes = figure.add_subplot()
        for colour, (name, runs) in zip(_colours(len(groups)), groups.items(), strict=True):
            if not (series := _series(runs, key, over, from_first_step=log)):
                continue
            series = [(x, y * scale) for x, y in series]
            if smoothed and len(groups) <= 4:
                for x, y in series:
                    axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            x, y = _aligned([(x, smooth(y) if smoothed else y) for x, y in series])
            if len(series) > 1:
                axes.fill_between(x, np.nanmin(y, 0), np.nanmax(y, 0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, np.nanmean(y, 0), color=colour, label=name, marker=marker, markersize=3.5, linewidth=1.6)
        if not axes.lines:
            return None
        if log:
            _logarithmic(axes)
        if from_zero:
            axes.set_ylim(0, 1.05 * axes.dataLim.ymax)
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if over == "tokens" else FuncFormatter(_plain))
        axes.set_xlabel("tokens" if over == "tokens" else "minutes of training")
        axes.set_title(label)
        _legend(figure, axes, width)
        return figure


def plot_coverage(run: RunRecords, width: str) -> Figure | None:
    """The share of each layer's rows that were ever selected, against tokens; None for a run that selects no rows.

    ``width`` is a key of WIDTHS.
    """
    layers, tokens, shares = run.coverage()
    if not layers:
        return None
    thin = max(1, len(tokens) // 400)
    height = min(1.6, max(0.35, (0.016 if width == "wide" else 0.03) * len(layers)))
    with new_figure(WIDTHS[width], WIDTHS[width] * height, grid="none") as figure:
        axes = figure.add_subplot()
        edges = np.append(0.0, tokens[::thin]) if len(tokens) else np.array([0.0, 1.0])
        image = axes.pcolormesh(edges, np.arange(len(layers) + 1), shares[:, ::thin], vmin=0, vmax=1, cmap="viridis")
        axes.invert_yaxis()
        _label_layers(axes, layers, width)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(8 if width == "wide" else 4))
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, format=FuncFormatter(lambda x, _: f"{x:.0%}"))
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def _colours(count: int) -> Iterable:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def _series(runs: list[RunRecords], key: str, over: str, from_first_step: bool) -> list[tuple[Series, Series]]:
    """``key`` against ``over`` of each run that has logged it, with or without the points before the first step."""
    all_points = [run.series(key, over) for run in runs]
    points = [(x[x > 0], y[x > 0]) if from_first_step else (x, y) for x, y in all_points]
    return [(x, y) for x, y in points if len(x)]


def _aligned(series: Sequence[tuple[Series, Series]]) -> tuple[Series, Series]:
    """x (points,), the mean over the seeds, and y (seeds, points), NaN where a seed has fewer points.

    Seeds log at the same steps, so that only times differ among them.
    """
    x, y = np.full((2, len(series), max(len(x) for x, _ in series)), np.nan)
    for i, (xs, ys) in enumerate(series):
        x[i, : len(xs)], y[i, : len(ys)] = xs, ys
    return np.nanmean(x, 0), y


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    least, most = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=[1, 2, 3, 4, 6] if most < 8 * least else [1, 2, 5]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _legend(figure: Figure, axes: Axes, width: str) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = 1 if width == "narrow" else min(len(names), 3)
    figure.legend(handles, names, loc="outside lower left", ncols=columns)


def _label_layers(axes: Axes, layers: list[str], width: str) -> None:
    """Name every layer if there is room, else the blocks."""
    short = [name.removeprefix("layers.").replace("self_attn.", "").replace("mlp.", "") for name in layers]
    blocks = [name.split(".")[0] for name in short]
    if width == "wide" and len(layers) <= 40:
        ticks, labels = list(range(len(layers))), short
    else:
        ticks = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
        labels = [f"block {blocks[i]}" for i in ticks]
        every = max(1, len(ticks) // 12)
        ticks, labels = ticks[::every], labels[::every]
    axes.set_yticks([i + 0.5 for i in ticks], labels, fontsize=7)
