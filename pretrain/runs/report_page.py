"""The page of a report: runs in a table and in figures, with their samples and settings.

The page needs no other file and no network: its figures are inside.
"""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pretrain.runs.figures import WIDTHS, plot_coverage, plot_curves, save
from pretrain.runs.records import RunRecords, find_runs, group_by_seed
from pretrain.runs.sweep_results import LOGS, JobResult, results

Draw = Callable[[str], Figure | None]
COLUMNS = ["run", "steps", "tokens", "validation loss", "perplexity", "bits/byte", "tokens/s", "peak memory", "minutes"]
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1060px; margin: 0 auto;
       padding: 16px; }
h1 { font-size: 1.5em; margin: .3em 0; } h2 { font-size: 1.15em; margin: 1.6em 0 .3em; }
p, figcaption { color: #444; } figure { margin: 0; } img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9em; white-space: nowrap; }
th, td { padding: .25em .8em .25em 0; text-align: right; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
.best { font-weight: 700; } pre { overflow-x: auto; background: #f6f6f6; padding: .8em; font-size: .85em; }
summary { cursor: pointer; margin: .4em 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { body { font-size: 15px; } table { font-size: .8em; } h2, li { overflow-wrap: anywhere; }
  td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7em; } }
"""


def write_report(paths: list[Path], out: Path) -> Path:
    """Write ``out``/index.html, and its figures as PNG files; returns the path of the page.

    Args:
        paths: folders of runs, or folders that contain some, such as a sweep's. Finished or not.

    Raises:
        ValueError: a path holds no run that has logged anything.
    """
    runs = find_runs(paths)
    groups = group_by_seed(runs)
    out.mkdir(parents=True, exist_ok=True)
    figures = [_figure(out, *figure) for figure in _curves(groups)]
    figures += [_figure(out, *_coverage(run)) for run in runs]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [f"<h1>{html.escape(title)}</h1>", _table(runs), *_failed(paths), *figures, *map(_details, runs)]
    page = out / "index.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n{''.join(body)}</body>\n</html>\n",
        encoding="utf-8",
    )
    return page


def _curves(groups: dict[str, list[RunRecords]]) -> list[tuple[str, str, str, Draw]]:
    """The name of the file, heading, caption and drawing of each figure of metrics."""

    def draw(key: str, label: str, **options: Any) -> Draw:
        return lambda width: plot_curves(groups, key, label, width, **options)

    return [
        ("loss-tokens", "Training loss against tokens", "A moving average; the logged values are behind it.",
         draw("train/loss", "nats per token", log=True, smoothed=True)),
        ("loss-time", "Training loss against time", "The time of training steps, without validation and saving.",
         draw("train/loss", "nats per token", over="minutes", log=True, smoothed=True)),
        ("validation-tokens", "Validation loss against tokens", "",
         draw("val/loss", "nats per token", log=True, marker="o")),
        ("validation-time", "Validation loss against time", "",
         draw("val/loss", "nats per token", over="minutes", log=True, marker="o")),
        ("captured", "Share of the gradient caught", "The gradient norm of the selected rows over that of all rows, "
         "estimated when rows are selected; the mean over the layers.", draw("grass/captured", "%", scale=100)),
        ("covered", "Rows ever selected", "The mean over the layers.", draw("grass/coverage", "%", scale=100)),
        ("speed", "Speed", "", draw("perf/tokens_per_s", "tokens per second", from_zero=True)),
        ("memory", "Peak memory so far", "Of CUDA's allocator, or of the process on a CPU.",
         draw("mem/peak_bytes", "GiB", scale=2.0**-30, from_zero=True)),
    ]  # fmt: skip


def _coverage(run: RunRecords) -> tuple[str, str, str, Draw]:
    name = f"coverage-{run.name.replace('/', '-')}"
    caption = "The share of each layer's rows that have been selected so far."
    return name, f"Rows ever selected: {run.name}", caption, lambda width: plot_coverage(run, width)


def _figure(out: Path, name: str, heading: str, caption: str, draw: Draw) -> str:
    """A section with the figure at both widths; "" if there is nothing to draw."""
    sources = {}
    for width in WIDTHS:
        if (figure := draw(width)) is None:
            return ""
        file = save(figure, out / f"{name}{'-narrow' if width == 'narrow' else ''}.png")
        sources[width] = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    return (
        f"<h2>{html.escape(heading)}</h2>\n<figure><picture>"
        f'<source media="(max-width: 600px)" srcset="{sources["narrow"]}">'
        f'<img src="{sources["wide"]}" alt="{html.escape(heading)}"></picture>\n'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )


def _table(runs: list[RunRecords]) -> str:
    rows = [_row(run) for run in runs]
    losses = [row["validation loss"] for row in rows]
    best = min((loss for loss in losses if loss), default="", key=float)
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    lines = []
    for row in rows:
        mark = ' class="best"' if len(rows) > 1 and row["validation loss"] == best != "" else ""
        cells = "".join(f"<td>{html.escape(row[name])}</td>" for name in COLUMNS)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{chr(10).join(lines)}\n</table></div>\n'


def _row(run: RunRecords) -> dict[str, str]:
    """The latest value of each column as text; "" where none was logged yet."""

    def latest(key: str, form: str, scale: float = 1.0) -> str:
        _, values = run.series(key)
        return format(values[-1] * scale, form) if len(values) else ""

    _, speeds = run.series("perf/tokens_per_s")
    texts = [
        run.name, run.progress, latest("tokens", ",.0f"), latest("val/loss", ".4f"), latest("val/perplexity", ",.2f"),
        latest("val/bits_per_byte", ".4f"), f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if len(speeds) else "",
        latest("mem/peak_bytes", ".2f", 2.0**-30) + " GiB", latest("minutes", ".1f"),
    ]  # fmt: skip
    return dict(zip(COLUMNS, texts, strict=True))


def _failed(paths: list[Path]) -> list[str]:
    """A list of the jobs of sweeps whose latest attempt failed."""
    latest: dict[str, JobResult] = {}
    for logs in sorted(logs for path in paths for logs in path.rglob(f"{LOGS}/*")):
        latest |= {job.folder: job for job in results(logs)}
    failed = [job for job in latest.values() if job.status == "failed"]
    lines = [f"<li>{html.escape(job.name)}: {html.escape(job.reason)}</li>" for job in failed]
    return ["<h2>Failed</h2>\n<ul>", *lines, "</ul>\n"] if lines else []


def _details(run: RunRecords) -> str:
    """The run's samples and settings, to unfold."""
    parts = []
    for heading, file in (("samples", "samples.md"), ("settings", "config.yaml")):
        if (path := run.path / file).exists():
            text = html.escape(path.read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{html.escape(run.name)}: {heading}</summary><pre>{text}</pre></details>\n")
    return "".join(parts)
