"""The page of a report: the settings and results of runs, their charts, coverage of rows and samples.

The page needs no other file and no network. It contains its data as JSON, and report.js draws the charts.
"""

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.runs.charts import LOSSES, OTHERS, Chart, Group, as_json, charts_of
from pretrain.runs.records import RunRecords, find_runs, group_by_data, group_by_seed
from pretrain.runs.report_tables import about, differences, results
from pretrain.runs.sweep_results import LOGS, JobResult
from pretrain.runs.sweep_results import results as job_results

HERE = Path(__file__).parent
MOST_COLUMNS = 200  # of a coverage map on the page
WATCH_SECONDS = 30


def write_report(paths: list[Path], out: Path, watched: bool = False) -> Path:
    """Write ``out``/index.html, and its charts as PNG files; returns the path of the page.

    Args:
        paths: folders of runs, finished or not, or folders that contain runs, such as a sweep's.
        watched: the page is written repeatedly, so it reloads itself, and no PNG is written.

    Raises:
        ValueError: a path contains no run that has logged anything.
    """
    runs = find_runs(paths)
    sets = _numbered(group_by_data(runs))
    charts = _charts(sets)
    out.mkdir(parents=True, exist_ok=True)
    if not watched:
        _write_pictures(charts, runs, out)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        f"<header><h1>{html.escape(title)}</h1>\n{about(runs)}</header>\n",
        *_results(sets), *_failed(paths), differences(runs), _legend(sets), '<div id="charts"></div>\n',
        *map(_details, runs),
    ]  # fmt: skip
    data = {"charts": [as_json(chart) for chart in charts], "names": _names(sets), "coverage": _coverage(runs)}
    page = out / "index.html"
    temporary = out / "index.html.part"  # because a browser may read the page while it is written
    temporary.write_text(_document(title, "".join(body), data, watched), encoding="utf-8")
    temporary.replace(page)
    return page


def _document(title: str, body: str, data: dict[str, Any], watched: bool) -> str:
    css, script = ((HERE / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    # "<" could end the element with the data.
    inside = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    reload = f' data-reload="{WATCH_SECONDS}"' if watched else ""
    return (
        f'<!doctype html>\n<html lang="en"{reload}>\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{css}</style>\n</head>\n<body>\n{body}"
        "<noscript><p>The charts need JavaScript; they are also PNG files in the folder of this page.</p></noscript>\n"
        f'<script type="application/json" id="data">{inside}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _numbered(sets: list[list[RunRecords]]) -> dict[str, list[Group]]:
    """The groups of each set of comparable runs, by the name of the data; groups are numbered over all sets."""
    named: dict[str, list[Group]] = {}
    count: Counter[str] = Counter()
    number = 0
    for runs in sets:
        name = _data_name(runs[0])
        count[name] += 1
        groups = []
        for group_name, group in group_by_seed(runs).items():
            groups.append(Group(number, group_name, group))
            number += 1
        named[name if count[name] == 1 else f"{name} ({count[name]})"] = groups
    return named


def _data_name(run: RunRecords) -> str:
    """The data, the vocabulary size and the sequence length, as text."""
    data, pieces, length = run.settings["data"], run.settings["model"]["vocab_size"], run.settings["train"]["seq_len"]
    places = [Path(path).name for path in data["paths"]] or [name for name in [data["dataset"]] if name]
    text = f" ({', '.join(places[:3])}{', …' if len(places) > 3 else ''})" if places else ""
    return f"{data['name']}{text}, vocabulary of {pieces:,}, sequences of {length:,}"


def _charts(sets: dict[str, list[Group]]) -> list[Chart]:
    """Charts of losses for each set of comparable runs, and charts of all other metrics for all runs."""
    charts = []
    for number, (name, groups) in enumerate(sets.items(), start=1):
        charts += charts_of(groups, LOSSES, name if len(sets) > 1 else "", f"-{number}" if number > 1 else "")
    return charts + charts_of([group for groups in sets.values() for group in groups], OTHERS)


def _write_pictures(charts: list[Chart], runs: list[RunRecords], out: Path) -> None:
    from pretrain.runs.figures import plot_chart, plot_coverage, save  # matplotlib takes a second to import

    for chart in charts:
        save(plot_chart(chart), out / f"{chart.name}.png")
    for run in runs:
        if figure := plot_coverage(run):
            save(figure, out / f"coverage-{run.name.replace('/', '-')}.png")


def _names(sets: dict[str, list[Group]]) -> list[str]:
    return [group.name for groups in sets.values() for group in groups]


def _coverage(runs: list[RunRecords]) -> list[dict[str, Any]]:
    """For each run that selects rows: its layers, tokens, and percentages of rows ever selected by layer and time."""
    maps = []
    for run in runs:
        layers, tokens, shares = run.coverage()
        if layers and len(tokens):
            kept = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), MOST_COLUMNS)).round().astype(int))
            percent = np.nan_to_num(100 * shares[:, kept]).round().astype(int)
            shown = {"tokens": tokens[kept].tolist(), "percent": percent.tolist()}
            maps.append({"run": run.name, "layers": layers, **shown})
    return maps


def _results(sets: dict[str, list[Group]]) -> list[str]:
    """A table per set of comparable runs; runs of different sets are never ranked together."""
    if len(sets) == 1:
        return ["<h2>Results</h2>\n", *map(results, sets.values())]
    note = "<p>Losses with different data, tokenizers or sequence lengths are in separate tables.</p>\n"
    return ["<h2>Results</h2>\n", note, *(f"<h3>{html.escape(name)}</h3>\n{results(g)}" for name, g in sets.items())]


def _legend(sets: dict[str, list[Group]]) -> str:
    """The names of the lines in all charts: a click hides a line."""
    buttons = "".join(
        f'<button type="button" data-group="{number}" aria-pressed="true"><i class="dot" data-group="{number}"></i>'
        f"{html.escape(name)}</button>"
        for number, name in enumerate(_names(sets))
    )
    one = " hidden" if len(_names(sets)) == 1 else ""
    axis = '<label><input type="checkbox" id="log-x"> logarithmic x axis</label>'
    return f'<h2>Charts</h2>\n<nav class="legend" aria-label="Lines"><span{one}>{buttons}</span>{axis}</nav>\n'


def _failed(paths: list[Path]) -> list[str]:
    """A list of the jobs of sweeps whose latest attempt failed."""
    latest: dict[str, JobResult] = {}
    for logs in sorted(logs for path in paths for logs in path.rglob(f"{LOGS}/*")):
        latest |= {job.folder: job for job in job_results(logs)}
    failed = [job for job in latest.values() if job.status == "failed"]
    lines = [f"<li>{html.escape(job.name)}: {html.escape(job.reason)}</li>" for job in failed]
    return ["<h2>Failed</h2>\n<ul>", *lines, "</ul>\n"] if lines else []


def _details(run: RunRecords) -> str:
    """Expandable sections with the run's coverage of rows, samples and settings."""
    name, parts = html.escape(run.name), []
    if run.selection:
        parts.append(
            f'<details class="coverage" data-run="{name}"><summary>{name}: rows ever selected, by layer</summary>'
            "</details>\n"
        )
    for heading, file in (("samples", "samples.md"), ("settings", "config.yaml")):
        if (path := run.path / file).exists():
            text = html.escape(path.read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{name}: {heading}</summary><pre>{text}</pre></details>\n")
    return "".join(parts)
