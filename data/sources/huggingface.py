"""Rows of a dataset loaded by Hugging Face's library `datasets`, by name or from a folder, streamed or not."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.settings import DataSettings
from data.sources.documents import Record
from data.sources.odd_files import find_odd_file
from data.sources.open_text import EXTRA
from data.sources.parquet import row_record


class Rows:
    """Iterates over the rows of the dataset of `settings` after the first `done` rows, as records of file 0.

    Raises:
        ValueError: The library cannot read the dataset. The message names the key, and if possible the file and line.
    """

    done_bytes = 0  # the library does not report the number of bytes

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
            except Exception as error:  # the library and its readers raise errors of many classes
                if isinstance(error, OSError) and not Path(s.dataset or "").exists():
                    raise ValueError(
                        f"data.dataset: {s.dataset} cannot be read after row {number} ({_short(error)}); the same "
                        "command resumes from there"
                    ) from None
                raise _unreadable(s, error, f" after row {number}") from None
            if row is None:
                return
            number += 1
            yield row_record(0, number, name, row.get(s.column))


def load(settings: DataSettings) -> Any:
    """Load the dataset from a folder written by `save_to_disk`, or with `load_dataset` (a name, or a folder of files).

    Returns:
        An IterableDataset if `settings.streaming`, else a Dataset.

    Raises:
        ValueError: The library is missing, or cannot read the dataset. The message names the key, and if possible the
            file and line.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data.source=datasets needs the library datasets, which is not installed; run {EXTRA}"
        ) from None
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
        name = str(folder.absolute()) if folder.is_dir() else s.dataset  # "csv" would name a builder of the library
        return datasets.load_dataset(
            name, s.dataset_name, split=s.dataset_split, revision=s.dataset_revision, streaming=s.streaming
        )
    except Exception as error:  # see above
        if isinstance(error, OSError) and not Path(s.dataset).exists():
            raise ValueError(
                f"data.dataset: {s.dataset} cannot be loaded ({_short(error)}); check the name and the network, or use "
                "a folder on this machine"
            ) from None
        raise _unreadable(s, error) from None


def _check_column(rows: Any, s: DataSettings) -> None:
    if rows.column_names is not None and s.column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise ValueError(f"data.column={s.column}: {s.dataset} has no such column; choose one of its columns ({names})")
    feature = (rows.features or {}).get(s.column)
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"data.column={s.column}: in {s.dataset} this column has the type {_short(feature)}; choose one of text"
        )


def _unreadable(s: DataSettings, error: Exception, where: str = "") -> ValueError:
    """The error for a dataset whose files the library cannot read, with the file and line if they are found."""
    folder = Path(s.dataset or "")
    if found := find_odd_file(folder):
        paths, hint = shlex.quote(f"data.paths=[{json.dumps(str(folder), ensure_ascii=False)}]"), ""
        if any(ending in found for ending in (".json", ".parquet")):
            hint = f", or use data=records {paths}, which needs no column but data.column"
        fix = f"fix or replace that file{hint}"
        return ValueError(f"data.dataset: {s.dataset} cannot be read{where}, because {found}; {fix}")
    below = error.__cause__ or error.__context__
    detail = _short(error) if below is None else f"{_short(error)} {_short(below)}"
    detail = "it has no rows" if isinstance(error, StopIteration) else detail
    fix = "check data.dataset_name and data.dataset_split, and that all files are complete and have the same columns"
    return ValueError(f"data.dataset: {s.dataset} cannot be read{where} ({detail}); {fix}")


def _short(value: Any) -> str:
    """The class and the first lines of an error, or a feature, on one line."""
    name = f"{type(value).__name__}: " if isinstance(value, BaseException) else ""
    return name + " ".join(str(value).split())[:300]
