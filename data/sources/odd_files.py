"""Find the file in a dataset's folder that a library cannot read, and its line, for a message."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.sources.documents import NOT_UTF8
from data.sources.open_text import READ_ERRORS, TextFile, pyarrow, reason

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
Columns = dict[str, str]  # name of a column → kind of its values


class _OddError(Exception):
    """A problem of a file, in words that follow the file's name."""


def find_odd_file(folder: Path) -> str:
    """Describe the first file below `folder` that cannot be read, else the first whose columns differ from before.

    Columns are compared with those of earlier files of the same type.

    Returns:
        A few words with the path, the problem and, if known, the line or row; empty if there is no such file.
    """
    known, odd = dict[Callable, Columns](), ""
    for path in sorted(folder.rglob("*")):
        read = next((read for endings, read in _READERS.items() if path.name.endswith(endings)), None)
        if read is None or not path.is_file():
            continue
        try:
            for place, columns in read(path):
                earlier = known.setdefault(read, columns)
                different = [name for name in {**earlier, **columns} if not _agree(earlier, columns, name)]
                if different and not odd:
                    odd = f"{path}{place} has other columns than the data before it ({', '.join(different)[:200]})"
                known[read] = {**columns, **earlier}
        except _OddError as error:
            return f"{path}{error}"
        except READ_ERRORS as error:
            return f"{path} cannot be read ({reason(error)})"
    return odd


def _agree(earlier: Columns, later: Columns, name: str) -> bool:
    """Whether both have the column, with the same kind of values or, in either, no values."""
    kinds = {earlier.get(name), later.get(name)} - {"NoneType"}
    return None not in kinds and len(kinds) <= 1


def _json_lines(path: Path) -> Iterator[tuple[str, Columns]]:
    number = 0
    try:
        with TextFile(path) as lines:
            _require_utf8(lines)
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield f", line {number},", {key: _kind(value) for key, value in _json_object(line, number).items()}
    except READ_ERRORS as error:
        raise _OddError(f" cannot be read after line {number} ({reason(error)})") from None
    except _OddError:
        if number == 1 and ".jsonl" not in path.name:
            return  # it may be one JSON array on many lines
        raise


def _json_object(line: bytes, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise _OddError(f", line {number}, is not JSON in UTF-8 ({reason(error)})") from None
    if not isinstance(entry, dict):
        raise _OddError(f", line {number}, is not a JSON object")
    return entry


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _table(path: Path) -> Iterator[tuple[str, Columns]]:
    with TextFile(path) as lines:
        _require_utf8(lines)
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise _OddError(f", line {number}, is {NOT_UTF8}") from None
            if number == 1 and path.suffix != ".txt":
                header = next(csv.reader([text.strip()], delimiter="\t" if path.suffix == ".tsv" else ","), [])
                yield ", line 1,", dict.fromkeys(header, "column")


def _require_utf8(lines: TextFile) -> None:
    if problem := lines.problem or (lines.encoding if lines.encoding != "UTF-8" else ""):
        raise _OddError(f" is {problem}, but the library needs UTF-8")


def _parquet(path: Path) -> Iterator[tuple[str, Columns]]:
    arrow = pyarrow()
    from pyarrow.parquet import ParquetFile

    row = 0
    try:
        with ParquetFile(path) as table:
            yield "", {field.name: str(field.type) for field in table.schema_arrow}
            for batch in table.iter_batches():
                row += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise _OddError(f" cannot be read after row {row} ({reason(error)})") from None


def _arrow(path: Path) -> Iterator[tuple[str, Columns]]:
    arrow, row = pyarrow(), 0
    try:
        with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as batches:
            yield "", {field.name: str(field.type) for field in batches.schema}
            for batch in batches:
                row += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise _OddError(f" cannot be read after row {row} ({reason(error)})") from None


_READERS = {JSON_LINES: _json_lines, (".csv", ".tsv", ".txt"): _table, (".parquet",): _parquet, (".arrow",): _arrow}
