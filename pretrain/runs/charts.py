"""The charts of a report: metrics against tokens or time, one line per group of runs that differ only in their seed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.runs.records import RunRecords, Series

MEMORY = 1 / 25  # length of the moving average, as a share of all points
MOST_POINTS = 400  # per line on the page
MOST_SMOOTHED = 4  # maximum number of smoothed lines whose logged values are drawn too
UNITS = {"tokens": "tokens", "minutes": "minutes of training"}
LOSS = "nats per token"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed: ``number`` chooses the colour of their lines, ``name`` is shown."""

    number: int
    name: str
    runs: list[RunRecords]


@dataclass(frozen=True)
class Line:
    """The line of one group: the mean ``y`` over its seeds at each ``x``, both (points,).

    low, high   the minimum and maximum over the seeds (points,); None for one seed
    logged      x and y of the logged values, for each seed, to be drawn behind a moving average; else empty
    """

    group: Group
    x: Series
    y: Series
    low: Series | None
    high: Series | None
    logged: list[tuple[Series, Series]]


@dataclass(frozen=True)
class Metric:
    """A metric of metrics.jsonl, and how it is drawn.

    name      of the PNG files of its charts, with "-tokens" and "-time" if there are two
    key       in the lines of metrics.jsonl
    title     of its charts
    unit      of the y axis
    caption   a sentence below the chart on the page; "" for none
    over      the x-axes, "tokens", "minutes" or both; a chart for each
    scale     factor of the logged values
    log       whether the y axis is logarithmic
    zero      whether the y axis starts at zero
    smoothed  whether lines are moving averages
    markers   whether each point is marked
    """

    name: str
    key: str
    title: str
    unit: str
    caption: str = ""
    over: Sequence[str] = ("tokens",)
    scale: float = 1.0
    log: bool = False
    zero: bool = False
    smoothed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A metric against ``over``, tokens or minutes.

    name  of its PNG file
    data  the name of the data of its runs, if the report has several; "" for a chart of all runs
    """

    name: str
    title: str
    data: str
    caption: str
    over: str
    metric: Metric
    lines: list[Line]


LOSSES = [
    Metric("loss", "train/loss", "Training loss", LOSS, "A moving average.",
           ("tokens", "minutes"), log=True, smoothed=True),
    Metric("validation", "val/loss", "Validation loss", LOSS, "Begins before the first step.", ("tokens", "minutes"),
           log=True, markers=True),
]  # fmt: skip
OTHERS = [
    Metric("learning-rate", "train/lr", "Learning rate", "of the linear layers"),
    Metric("gradient-norm", "train/grad_norm", "Gradient norm", "norm before clipping",
           "The norm over all trained parameters.", log=True),
    Metric("captured", "grass/captured", "Share of the gradient caught", "%", "The gradient norm of the selected rows "
           "divided by that of all rows, estimated when rows are selected; the mean over the layers.", scale=100),
    Metric("covered", "grass/coverage", "Rows ever selected", "%", "The mean over the layers.", scale=100),
    Metric("speed", "perf/tokens_per_s", "Speed", "tokens per second", zero=True),
    Metric("memory", "mem/peak_bytes", "Peak memory so far", "GiB", "Of CUDA's allocator, or of the process on a CPU.",
           scale=2.0**-30, zero=True),
]  # fmt: skip


def charts_of(groups: list[Group], metrics: Iterable[Metric], data: str = "", suffix: str = "") -> list[Chart]:
    """The charts of ``metrics``, with a line per group; metrics that no group has logged are left out.

    Args:
        data: as in ``Chart``.
        suffix: the end of the names of their PNG files.
    """
    charts = []
    for metric, over in [(each, over) for each in metrics for over in each.over]:
        keep_logged = metric.smoothed and len(groups) <= MOST_SMOOTHED
        lines = [line for group in groups if (line := _line(group, metric, over, keep_logged))]
        if not lines:
            continue
        name, title = metric.name, metric.title
        if len(metric.over) > 1:
            axis = "time" if over == "minutes" else over
            name, title = f"{name}-{axis}", f"{title} against {axis}"
        caption = "Time of training steps, without validation and saving." if over == "minutes" else metric.caption
        if keep_logged and over == "tokens":
            caption += " The logged values are in the background."
        charts.append(Chart(name + suffix, title, data, caption, over, metric, lines))
    return charts


def _line(group: Group, metric: Metric, over: str, keep_logged: bool) -> Line | None:
    """The line of ``group``; None if it has logged no finite value of the metric."""
    logged = []
    for run in group.runs:
        x, y = run.series(metric.key, over)
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            logged.append((x[finite], y[finite] * metric.scale))
    if not logged:
        return None
    x, ys = _aligned([(x, smooth(y) if metric.smoothed else y) for x, y in logged])
    several = len(logged) > 1
    low, high = (np.nanmin(ys, 0), np.nanmax(ys, 0)) if several else (None, None)
    return Line(group, x, np.nanmean(ys, 0), low, high, logged if keep_logged else [])


def smooth(values: Series) -> Series:
    """The exponential moving average (n,) of values (n,), with bias correction: the first value is unchanged."""
    keep = 1 - 1 / (1 + MEMORY * len(values))
    average, weight, result = 0.0, 0.0, np.empty_like(values)
    for i, value in enumerate(values):
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        result[i] = average / weight
    return result


def _aligned(series: Sequence[tuple[Series, Series]]) -> tuple[Series, Series]:
    """x (points,), the mean over the seeds, and y (seeds, points), NaN if a seed has fewer points.

    Seeds log at the same steps, so only times differ between them.
    """
    x, y = np.full((2, len(series), max(len(x) for x, _ in series)), np.nan)
    for i, (xs, ys) in enumerate(series):
        x[i, : len(xs)], y[i, : len(ys)] = xs, ys
    return np.nanmean(x, 0), y


def as_json(chart: Chart) -> dict[str, Any]:
    """The chart for the page's script: at most about 400 points per line, with six significant digits."""
    lines = []
    for line in chart.lines:
        keep = _kept(line.y)
        entry: dict[str, Any] = {"group": line.group.number, "points": _pairs(line.x[keep], line.y[keep])}
        if line.low is not None and line.high is not None:
            entry["band"] = list(_pairs(line.x[keep], line.low[keep], line.high[keep]))
        entry["logged"] = [_pairs(x[kept], y[kept]) for x, y in line.logged for kept in [_kept(y)]]
        lines.append(entry)
    return {
        "name": chart.name, "title": chart.title, "data": chart.data, "caption": chart.caption,
        "over": UNITS[chart.over], "unit": chart.metric.unit, "log": chart.metric.log, "zero": chart.metric.zero,
        "markers": chart.metric.markers, "lines": lines,
    }  # fmt: skip


def _pairs(*columns: Series) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in zip(*columns, strict=True)]


def _kept(y: Series) -> Any:
    """The indices of the points to draw: the first, the last, and the minimum and maximum of each interval."""
    if len(y) <= MOST_POINTS:
        return np.arange(len(y))
    return np.unique([0, len(y) - 1, *_extremes(y)])


def _extremes(y: Series) -> Iterator[int]:
    start = 0
    for stretch in np.array_split(y, MOST_POINTS // 2):
        yield start + int(stretch.argmin())
        yield start + int(stretch.argmax())
        start += len(stretch)
