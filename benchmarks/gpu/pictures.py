"""The plots of docs/gpu.md: tokens per second relative to AdamW, and memory compared with the plan."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.gpu.expected import AIMS
from benchmarks.gpu.results import Record, Row
from benchmarks.gpu.sections import SECTIONS
from pretrain.runs.figures import COLOURS, GREY, new_figure, save


def draw(records: dict[str, Record], folder: Path) -> list[Path]:
    """Draw each plot for which ``records`` has data. Return the files."""
    rows = {
        module: [row for name, record in records.items() if SECTIONS[name].module == module for row in record["rows"]]
        for module in ("step_times", "memory")
    }
    timed = [row for row in rows["step_times"] if row.get("of_adamw")]
    held = [row for row in rows["memory"] if row.get("peak_gib")]
    drawn = []
    for name, figure in (("gpu_step_times.png", step_times(timed)), ("gpu_memory.png", memory(held))):
        if figure:
            drawn.append(save(figure, folder / name))
    return drawn


def step_times(rows: list[Row]) -> Figure | None:
    """Draw tokens per second relative to AdamW, with a panel for each case and a line for the target of Grass."""
    if not rows:
        return None
    cases = list(dict.fromkeys(row["case"] for row in rows))
    with new_figure(height=1.1 + 2.2 * len(cases), grid="x") as figure:
        for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
            of_case = [row for row in rows if row["case"] == case]
            colours = [COLOURS[1] if row["method"].startswith("grass") else COLOURS[0] for row in of_case]
            bars = axes.barh([row["method"] for row in of_case], [row["of_adamw"] for row in of_case], color=colours)
            axes.bar_label(bars, [f"{row['of_adamw']:.2f}" for row in of_case], padding=3, fontsize=8)
            axes.axvline(1.0, color=GREY, linewidth=0.8)
            axes.axvline(AIMS[case.partition("_")[0]], color=COLOURS[2], linewidth=1.2, linestyle="--")
            axes.set_title(f"{case}: speed relative to AdamW (dashed: the target for Grass)")
            axes.invert_yaxis()
        return figure


def memory(rows: list[Row]) -> Figure | None:
    """Draw planned and measured peaks of each experiment, with a line for the memory of its card."""
    if not rows:
        return None
    labels = [row["case"].replace(" ", "\n") for row in rows]
    with new_figure(height=3.6, grid="y") as figure:
        axes = figure.add_subplot()
        bars = {"planned_gib": "planned", "peak_gib": "allocated", "taken_gib": "used on the device"}
        for shift, (key, label) in zip((-0.27, 0.0, 0.27), bars.items(), strict=True):
            axes.bar([n + shift for n in range(len(rows))], [row[key] for row in rows], width=0.25, label=label)
        for place, row in enumerate(rows):
            axes.hlines(row["card_gib"], place - 0.42, place + 0.42, color="#000000", linewidth=1.2)
        axes.set_xticks(range(len(rows)), labels, rotation=90 if len(rows) > 4 else 0)
        axes.set_title("Planned and measured memory (line: memory of the card)")
        axes.set_ylabel("GiB")
        figure.legend(loc="outside lower center", ncols=3)
        return figure
