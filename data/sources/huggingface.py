"""Rows of a dataset that Hugging Face's library `datasets` loads, by name or from a folder, streamed or not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.settings import DataSettings
from data.sources.documents import Record
from data.sources.open_text import EXTRA, READ_ERRORS, TextFile, reason
from data.sources.parquet import row_record

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


class Rows:
    """Iterates over the rows after the first `done`, as records of one file.

    Raises ValueError naming the key, and the file and line where they can be found out, for a dataset that cannot be
    read, whatever error the library raises.
    """

    done_bytes = 0  # the library does not say how many there are

    def __init__(self, settings: DataSettings, done: int) -> None:
        self._settings, self._done = settings, done

    def __iter__(self) -> Iterator[Record]:
        rows, s = load(self._settings), self._settings
        _check_column(rows, s)
        number, name = self._done, Path(s.dataset or "").name
        remaining = iter(rows.skip(self._done))
        while True:
            try:
                row = next(remaining, None)
            except (ConnectionError, OSError) as error:
                raise ValueError(
                    f"data.dataset: {s.dataset} cannot be read after row {number} ({_short(error)}); the same command "
                    "resumes from there"
                ) from None
            except Exception as error:  # the library raises errors of many classes, those of its readers among them
                raise _unreadable(s, error, f" after row {number}") from None
            if row is None:
                return
            number += 1
            yield row_record(0, number, name, row.get(s.column))


def load(settings: DataSettings) -> Any:
    """The dataset: from a folder that `save_to_disk` wrote, or by anything else that `load_dataset` takes.

    Raises ValueError as ``Rows`` does.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.source: datasets needs the library of this name, which is missing: {EXTRA}") from None
    s = settings
    assert s.dataset
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors are raised as well
    try:
        if Path(s.dataset, "state.json").exists() or Path(s.dataset, "dataset_dict.json").exists():
            found = datasets.load_from_disk(s.dataset)
            rows = found[s.dataset_split] if isinstance(found, datasets.DatasetDict) else found
            return rows.to_iterable_dataset() if s.streaming else rows
        folder = Path(s.dataset)
        name = str(folder.absolute()) if folder.is_dir() else s.dataset  # "csv" alone would be a builder of the library
        return datasets.load_dataset(
            name, s.dataset_name, split=s.dataset_split, revision=s.dataset_revision, streaming=s.streaming
        )
    except (ConnectionError, OSError) as error:
        raise ValueError(
            f"data.dataset: {s.dataset} cannot be had ({_short(error)}); check the name and the network, or name a "
            "folder on this machine"
        ) from None
    except Exception as error:  # see above
        raise _unreadable(s, error) from None


def _check_column(rows: Any, s: DataSettings) -> None:
    if rows.column_names is not None and s.column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise ValueError(f"data.column: {s.dataset} has no {s.column}, but {names}; name one of these")
    feature = (rows.features or {}).get(s.column)
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"data.column: {s.column} of {s.dataset} is {_short(feature)}, which is no text; name a column of text"
        )


def _unreadable(s: DataSettings, error: Exception, where: str = "") -> ValueError:
    """The error of a dataset whose files the library cannot read: the file and the line, if it is in JSON lines."""
    folder = Path(s.dataset or "")
    if found := first_odd_line(folder):
        return ValueError(
            f"data.dataset: {s.dataset} cannot be read{where}: {found}; fix that file, or read the lines without this "
            f"library: data=records data.paths=[{folder}] takes any lines that have data.column"
        )
    below = error.__cause__ or error.__context__
    detail = _short(error) if below is None else f"{_short(error)} {_short(below)}"
    return ValueError(
        f"data.dataset: {s.dataset} cannot be read{where} ({detail}); check dataset_name and dataset_split, and that "
        "all files have the same columns"
    )


def first_odd_line(folder: Path) -> str:
    """The first line of a folder's JSON lines that is not JSON, else the first whose columns differ from earlier ones.

    A few words that name file and line; empty where there is no such line.
    """
    columns, odd = dict[str, str](), ""
    for path in sorted(path for path in folder.rglob("*") if path.name.endswith(JSON_LINES)):
        number = 0
        try:
            with TextFile(path) as lines:
                if problem := lines.problem or (lines.encoding if lines.encoding != "UTF-8" else ""):
                    return f"{path} is {problem}, and the library reads UTF-8"
                for number, line in enumerate(lines, start=1):
                    if line.isspace():
                        continue
                    entry = json.loads(line.decode().removeprefix("\ufeff"))
                    if not isinstance(entry, dict):
                        return f"{path}, line {number}, is no JSON object"
                    found = {key: _kind(value) for key, value in entry.items()}
                    different = [key for key in {**columns, **found} if not _agree(columns, found, key)]
                    if columns and different and not odd:
                        odd = f"{path}, line {number}, has other columns than the lines before ({', '.join(different)})"
                    columns = {**found, **columns}
        except READ_ERRORS as error:
            return f"{path} cannot be read after line {number} ({reason(error)})"
        except (ValueError, RecursionError) as error:
            if number > 1 or ".jsonl" in path.name:  # else the file may be one JSON array on many lines
                return f"{path}, line {number}, is no JSON in UTF-8 ({reason(error)})"
    return odd


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _agree(earlier: dict[str, str], later: dict[str, str], key: str) -> bool:
    """Whether two rows both have a column, with values of one kind or none."""
    kinds = {earlier.get(key), later.get(key)} - {"NoneType"}
    return None not in kinds and len(kinds) <= 1


def _short(value: Any) -> str:
    """The class and the first lines of an error, or a feature, on one line."""
    name = f"{type(value).__name__}: " if isinstance(value, BaseException) else ""
    return name + " ".join(str(value).split())[:300]
