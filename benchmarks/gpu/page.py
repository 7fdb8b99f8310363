"""Write docs/gpu.md from a result file: tables between two marks of the page, and plots. Measures nothing."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plain
from benchmarks.gpu.expected import expected
from benchmarks.gpu.pictures import draw
from benchmarks.gpu.results import DONE, FILE, Record, Row, load
from benchmarks.gpu.sections import SECTIONS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = "gpu.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NO_WORTH = "**{why}: the numbers below mean nothing.** They show that the benchmark runs, and how this page looks."
OUTCOMES = ("fails", "lacks", "skipped")

# Columns of each module's table: heading, key of the row, format of the value.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "machine": [
        ("", "what", ""), ("TB/s", "tb_per_s", ".2f"), ("GB/s", "gb_per_s", ".1f"), ("TFLOP/s", "tflop_per_s", ".0f"),
    ],
    "exactness": [("", "what", ""), ("elements", "elements", ",d"), ("different", "different", ",d")],
    "attention": [
        ("b, t, heads, head_dim", "shape", ""), ("kernel", "kernel", ""), ("document masks", "documents", ""),
        ("chosen", "chosen", ""), ("ms", "ms", ".3f"), ("TFLOP/s", "tflop_per_s", ".0f"),
    ],
    "decoding": [("", "lengths", ""), ("tokens", "tokens", "d"), ("ms per token", "ms_per_token", ".2f")],
    "correctness": [
        ("method", "method", ""), ("", "way", ""), ("first loss", "first", ".4f"), ("last", "last", ".4f"),
        ("last on the CPU", "cpu_last", ".4f"), ("largest difference", "worst", ".1e"),
        ("layers with the same rows", "same_rows", "d"), ("of", "layers", "d"),
        ("rows in common", "common_rows", ".1%"),
    ],
    "waits": [
        ("", "case", ""), ("steps", "steps", "d"), ("waits", "waits", "d"), ("most in a step", "most_in_a_step", "d"),
        ("steps without a wait", "steps_without", "d"), ("where", "places", ""),
    ],
    "memory": [
        ("", "case", ""), ("planned GiB", "planned_gib", ".2f"), ("peak", "peak_gib", ".2f"),
        ("reserved", "reserved_gib", ".2f"), ("used on the device", "taken_gib", ".2f"),
        ("peak of choosing rows", "peak_gib_choosing", ".2f"), ("choosing s", "initial_rows_s", ".1f"),
        ("step s", "step_s", ".2f"),
    ],
    "step_times": [
        ("method", "method", ""), ("tokens/s", "tokens_per_s", ",.0f"), ("of AdamW's", "of_adamw", ".3f"),
        ("ms a step", "ms", ".1f"), ("low quartile", "low_ms", ".1f"), ("median", "median_ms", ".1f"),
        ("high quartile", "high_ms", ".1f"),
        ("host ms", "host_ms", ".1f"), ("TFLOP/s", "tflop_per_s", ".0f"), ("refresh ms", "refresh_ms", ",.0f"),
        ("every", "refresh_every", "d"), ("peak GiB", "peak_gib", ".1f"), ("warm-up s", "warm_up_s", ".0f"),
    ],
    "checkpoints": [
        ("save", "save", "d"), ("GiB", "gib", ".2f"), ("blocked s", "blocked_s", ".3f"),
        ("written s", "written_s", ".2f"),
    ],
    "products": [
        ("", "size", ""), ("tokens", "tokens", ",d"), ("out", "out", "d"), ("in", "into", "d"),
        ("forward ms", "forward_ms", ".3f"), ("input gradient", "input_gradient_ms", ".3f"),
        ("full weight gradient", "whole_ms", ".3f"), ("1/4 of the rows", "narrow_4_ms", ".3f"),
        ("1/8", "narrow_8_ms", ".3f"),
        ("gather of 1/8", "gather_8_ms", ".3f"), ("TFLOP/s, full", "whole_tflop_per_s", ".0f"),
        ("1/4", "narrow_4_tflop_per_s", ".0f"), ("1/8", "narrow_8_tflop_per_s", ".0f"),
    ],
    "kernels": [
        ("method", "method", ""), ("ms a step", "step_ms", ".1f"), ("ms in kernels", "device_ms", ".1f"),
        ("idle", "idle", ".1%"), ("launches", "launches", ",.0f"), ("ms of the longest kernels", "kernels_ms", ""),
    ],
    "determinism": [
        ("", "how", ""), ("method", "method", ""), ("dtype", "dtype", ""), ("compiled", "compiled", ""),
        ("same losses", "same_losses", ""), ("same parameters", "same_parameters", ""),
    ],
}  # fmt: skip


def write_page(results: Path, folder: Path) -> Path:
    """Write the page, its plots and a copy of the ``results`` into ``folder``. Return the page's path.

    Raises:
        ValueError: ``results`` is no result file, or ``folder`` is docs/ and the numbers mean nothing.
    """
    records = {name: record for name, record in load(results).items() if name in SECTIONS}  # not of old versions
    if folder.resolve() == DOCS and any(map(no_worth, records.values())):
        raise ValueError(f"{results} holds numbers that mean nothing (a dry run?); choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    if results.resolve() != (folder / FILE).resolve():
        shutil.copy(results, folder / FILE)
    pictures = draw(records, folder)
    head, _, rest = (DOCS / PAGE).read_text().partition(BEGIN)
    page = folder / PAGE
    page.write_text(f"{head}{BEGIN}\n\n{body(records, pictures)}\n\n{END}{rest.partition(END)[2]}")
    return page


def no_worth(record: Record) -> str:
    """Return why the numbers of a section mean nothing, or "" if they are valid."""
    if record["dry"]:
        return "A dry run"
    return "" if record.get("computes") else "A device that does not compute"


def body(records: dict[str, Record], pictures: Sequence[Path]) -> str:
    """Return the text between the marks: the plots, then each section with its table."""
    parts = [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures]
    parts += [section_text(name, records[name]) for name in SECTIONS if name in records]
    if why := next(filter(None, map(no_worth, records.values())), ""):
        parts.insert(0, NO_WORTH.format(why=why))
    return "\n\n".join(parts)


def section_text(name: str, record: Record) -> str:
    """Return the heading, the origin and the table of a section."""
    section = SECTIONS[name]
    commit = (record["commit"] or "unknown")[:7] + ("-dirty" if (record["commit"] or "").endswith("-dirty") else "")
    made = (
        f"`python -m benchmarks.gpu --only {name}`, {record['began'][:10]}, commit {commit}, {record.get('device')}, "
        f"torch {record.get('torch')}, {record['seconds']:.0f} s"
    )
    if record["ended"] != DONE:
        made += f"; **{record['ended']}**"
    rows = record["rows"]
    texts = [f"### {name}: {section.question}", made]
    if name == "machine":
        texts += _about_machine(rows)
        rows = [row for row in rows if row["what"] not in ("machine", "optional package")]
    if rows:
        texts.append(table(section.module, rows))
    return "\n\n".join(texts)


def _about_machine(rows: list[Row]) -> list[str]:
    machine = next((row for row in rows if row["what"] == "machine"), {})
    packages = [row for row in rows if row["what"] == "optional package"]
    there = [f"{row['package']} {row['version']}" for row in packages if "version" in row]
    missing = [row["package"] for row in packages if "lacks" in row]
    return [
        ", ".join(
            f"{key} {_written(value, '')}" for key, value in machine.items() if key != "what" and value is not None
        ),
        f"Optional packages: {', '.join(there) or 'none'}. Missing: {', '.join(missing) or 'none'}.",
    ]


def table(module: str, rows: Sequence[Row]) -> str:
    """Return a Markdown table of the rows of a section of ``module``.

    A column without values is left out. The column "remark" says why a row was not measured.
    """
    columns = [column for column in COLUMNS[module] if any(row.get(column[1]) is not None for row in rows)]
    lines = [[_written(row.get(key), how) for _, key, how in columns] for row in rows]
    heads = [heading for heading, _, _ in columns]
    for heading, texts in (
        ("expected", [expected(module, row) for row in rows]),
        ("remark", ["; ".join(f"{kind}: {row[kind]}" for kind in OUTCOMES if kind in row) for row in rows]),
    ):
        if any(texts):
            heads.append(heading)
            lines = [[*line, text] for line, text in zip(lines, texts, strict=True)]
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


def _written(value: Any, how: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):  # waits by place, or milliseconds by kernel
        return "<br>".join(f"{count} × {what}" if isinstance(count, int) else f"{count} {what}"
                           for what, count in list(value.items())[:5])  # fmt: skip
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return format(value, how) if how else plain(value) if isinstance(value, float) else str(value)
