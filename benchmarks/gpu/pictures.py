"""The pictures of docs/gpu.md: tokens per second beside AdamW's, and memory beside the plan."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu.expected import AIMS
from benchmarks.gpu.results import Record, Row
from benchmarks.gpu.sections import SECTIONS
from pretrain.runs.figures import COLOURS, DPI


def draw(records: dict[str, Record], folder: Path) -> list[Path]:
    """Draw what ``records`` hold enough of; returns the files."""
    rows = {
        module: [row for name, record in records.items() if SECTIONS[name].module == module for row in record["rows"]]
        for module in ("step_times", "memory")
    }
    timed = [row for row in rows["step_times"] if row.get("of_adamw")]
    held = [row for row in rows["memory"] if row.get("peak_gib")]
    drawn = []
    for name, figure in (("gpu_step_times.png", step_times(timed)), ("gpu_memory.png", memory(held))):
        if figure:
            figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
            drawn.append(folder / name)
    return drawn


def step_times(rows: list[Row]) -> Figure | None:
    """A panel for each case: tokens per second as a multiple of AdamW's, and the aim for Grass as a line."""
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(10.4, 1.1 + 2.2 * len(cases)), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        of_case = [row for row in rows if row["case"] == case]
        colours = [COLOURS[1] if row["method"].startswith("grass") else COLOURS[0] for row in of_case]
        bars = axes.barh([row["method"] for row in of_case], [row["of_adamw"] for row in of_case], color=colours)
        axes.bar_label(bars, [f"{row['of_adamw']:.2f}" for row in of_case], padding=3, fontsize=8)
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.axvline(AIMS[case.partition("_")[0]], color=COLOURS[2], linewidth=1.2, linestyle="--")
        axes.set_title(f"{case}: tokens per second, in AdamW's (dashed: the aim for grass)", loc="left", fontsize=9)
        _plain(axes)
        axes.invert_yaxis()
    return figure


def memory(rows: list[Row]) -> Figure | None:
    """Planned and measured peaks of each experiment, and what its card has."""
    if not rows:
        return None
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    labels = [row["case"].replace(" ", "\n") for row in rows]
    for shift, key, colour, label in (
        (-0.27, "planned_gib", COLOURS[0], "planned"), (0.0, "peak_gib", COLOURS[1], "allocated"),
        (0.27, "taken_gib", COLOURS[2], "taken of the device"),
    ):  # fmt: skip
        places = [place + shift for place in range(len(rows))]
        axes.bar(places, [row[key] for row in rows], width=0.25, color=colour, label=label)
    for place, row in enumerate(rows):
        axes.hlines(row["card_gib"], place - 0.42, place + 0.42, color="#000000", linewidth=1.2)
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("GiB (line: the card)")
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
