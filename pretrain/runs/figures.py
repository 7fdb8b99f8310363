"""The pictures of runs, by matplotlib: a few curves against tokens or time, and which rows ever had a turn.

Each is drawn at two widths, for a page and for a telephone; letters keep their size.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from pretrain.runs.records import RunRecords, Series

WIDTHS = {"wide": 10.4, "narrow": 3.7}  # inches, of 100 pixels on the page
DPI = 200
MEMORY = 1 / 25  # of the moving average, as a share of all points
# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def smooth(values: Series) -> Series:
    """Exponential moving average with the start's bias corrected: the first value stays itself."""
    keep = 1 - 1 / (1 + MEMORY * len(values))
    average, weight, result = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result[i] = average / weight
    return result


def curves(
    groups: dict[str, list[RunRecords]], key: str, label: str, width: str, over: str = "tokens", log: bool = False,
    smoothed: bool = False, marker: str = "", scale: float = 1.0, from_zero: bool = False,
) -> Figure | None:  # fmt: skip
    """``key`` of each group against ``over``: the mean of its seeds in a band from the least to the greatest.

    Returns None when no run holds ``key``. ``log`` makes both axes logarithmic, which leaves out what was before the
    first step; ``smoothed`` leaves the points as they are visible behind a moving average.
    """
    log = log and any((run.series(key, over)[0] > 0).any() for runs in groups.values() for run in runs)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(width, 0.42 if width == "wide" else 0.8)
        for colour, (name, runs) in zip(_colours(len(groups)), groups.items(), strict=True):
            series = [(x, y * scale) for x, y in (run.series(key, over) for run in runs)]
            series = [(x[x > 0], y[x > 0]) if log else (x, y) for x, y in series]
            series = [(x, y) for x, y in series if len(x)]
            if not series:
                continue
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
        axes.set_title(label, loc="left", fontsize=9, color="#444444")
        _legend(figure, axes, width)
        return figure


def coverage(run: RunRecords, width: str) -> Figure | None:
    """Layer by time, the share of its rows that were ever selected; None for a run that selects none."""
    layers, tokens, shares = run.coverage()
    if not layers:
        return None
    thin = max(1, len(tokens) // 400)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(width, min(1.6, max(0.35, (0.016 if width == "wide" else 0.03) * len(layers))))
        axes.grid(False)
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


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _figure(width: str, aspect: float) -> tuple[Figure, Axes]:
    """Without pyplot, which keeps every figure and may look for a screen."""
    figure = Figure(figsize=(WIDTHS[width], WIDTHS[width] * aspect), layout="constrained")
    return figure, figure.add_subplot()


def _colours(count: int) -> Iterable:
    if count <= len(COLOURS):
        return COLOURS[:count]
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.95, count))


def _aligned(series: Sequence[tuple[Series, Series]]) -> tuple[Series, Series]:
    """x (points,) and the seeds' y (seeds, points), NaN where a seed has not come so far.

    Seeds log at the same steps; where x is a time it is the mean of theirs.
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
    figure.legend(handles, names, loc="outside lower left", ncols=columns, fontsize=8)


def _label_layers(axes: Axes, layers: list[str], width: str) -> None:
    """Every layer's name where there is room, else the first of each block."""
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
