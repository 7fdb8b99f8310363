"""The tables of a report, as HTML: the results of runs, their common settings, and their different settings."""

import html
import json
from typing import Any

from pretrain.runs.charts import Group
from pretrain.runs.records import RunRecords

COLUMNS = ["run", "steps", "tokens", "validation loss", "perplexity", "bits/byte", "tokens/s", "peak memory", "minutes"]
LARGEST_PERPLEXITY = 1e6
SHOWN = [  # in the header, if all runs have the same value
    "model.name", "optim.name", "optim.inner", "optim.rank", "optim.attention_weight", "optim.selection",
    "optim.refresh_every", "optim.lr", "optim.linear_lr",
    "optim.schedule", "optim.warmup_steps", "train.steps", "train.tokens_per_step", "train.seq_len", "train.dtype",
    "train.seed", "train.init_from", "data.name", "data.paths", "data.tokenizer", "model.vocab_size",
]  # fmt: skip
# Settings that do not change the results of a run.
SURROUNDINGS = ("run.", "logger.", "estimate.", "data.root", "data.workers", "train.resume", "train.dry_run")


def about(runs: list[RunRecords]) -> str:
    """A list of the most important settings that all runs share, with the model's size, the commit and the machine."""
    shown = {}
    sizes = {(run.summary.get("parameters"), run.summary.get("trainable")) for run in runs}
    if len(sizes) == 1 and all(next(iter(sizes))):
        parameters, trainable = next(iter(sizes))
        shown["parameters"] = f"{parameters:,}"
        shown["trainable at a time"] = f"{trainable:,}"
    for key in SHOWN:
        values = {_text(run.flat_settings.get(key)) for run in runs}
        if len(values) == 1 and (value := next(iter(values))) not in ("–", "[]"):
            shown[key] = value
    for name, key in (("commit", "commit"), ("machine", "machine")):
        values = {str(run.summary.get(key) or "") for run in runs}
        if len(values) == 1 and (value := next(iter(values))):
            shown[name] = value[:12] if name == "commit" else value
    items = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in shown.items())
    return f'<dl class="about">{items}</dl>\n'


def differences(runs: list[RunRecords]) -> str:
    """A table of the settings in which runs differ, with a row per run; "" for a single run or without differences."""
    settings = [run.flat_settings for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if not key.startswith(SURROUNDINGS)]
    differing = [key for key in keys if len({_text(each.get(key)) for each in settings}) > 1]
    if not differing:
        return ""
    rows = [
        [(run.name, None), *(_cell(each.get(key)) for key in differing)]
        for run, each in zip(runs, settings, strict=True)
    ]
    return "<h2>Settings in which they differ</h2>\n" + _table(["run", *differing], rows)


def results(groups: list[Group]) -> str:
    """A table with the latest values of each run. If there are several runs, the lowest validation loss is marked."""
    lines = [(group, run) for group in groups for run in group.runs]
    rows = [_row(run) for _, run in lines]
    losses = {row[3][1] for row in rows if row[3][1] is not None}
    best = min(losses) if len(rows) > 1 and losses else None
    marks = ["best" if best is not None and row[3][1] == best else "" for row in rows]
    return _table(COLUMNS, rows, marks, [group.number for group, _ in lines])


def _row(run: RunRecords) -> list[tuple[str, float | None]]:
    """The text and the number of each column; "" if nothing has been logged yet."""

    def latest(key: str, form: str, scale: float = 1.0) -> tuple[str, float | None]:
        _, values = run.series(key)
        return (format(values[-1] * scale, form), float(values[-1])) if len(values) else ("", None)

    _, speeds = run.series("perf/tokens_per_s")
    median = float(sorted(speeds)[len(speeds) // 2]) if len(speeds) else None
    perplexity, memory = latest("val/perplexity", ",.2f"), latest("mem/peak_bytes", ".2f", 2.0**-30)
    if perplexity[1] is not None and not perplexity[1] <= LARGEST_PERPLEXITY:
        perplexity = (">1e6", LARGEST_PERPLEXITY)
    return [
        (run.name, None), (run.progress, run.step), latest("tokens", ",.0f"), latest("val/loss", ".4f"), perplexity,
        latest("val/bits_per_byte", ".4f"), ("" if median is None else f"{median:,.0f}", median),
        (f"{memory[0]} GiB" if memory[0] else "", memory[1]), latest("minutes", ".1f"),
    ]  # fmt: skip


def _table(
    heads: list[str], rows: list[list[tuple[str, float | None]]], marks: list[str] | None = None,
    colours: list[int] | None = None,
) -> str:  # fmt: skip
    """A table that the page's script can sort. ``colours`` are the numbers of lines in the charts."""
    head = "".join(f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' for name in heads)
    lines = []
    for number, row in enumerate(rows):
        mark = f' class="{marks[number]}"' if marks and marks[number] else ""
        dot = f'<i class="dot" data-group="{colours[number]}"></i>' if colours else ""
        cells = []
        for column, (text, value) in enumerate(row):
            sort = html.escape(text if value is None else repr(value))
            cells.append(f'<td data-value="{sort}">{dot if column == 0 else ""}{html.escape(text)}</td>')
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="sortable">\n{table}</table></div>\n'


def _cell(value: Any) -> tuple[str, float | None]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return _text(value), float(value) if number else None


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)
