"""Rows of a dataset of Hugging Face's library `datasets`, by its name or its folder, streamed or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.settings import DataSettings
from data.sources.documents import Record
from data.sources.records import EXTRA, row_record


class Rows:
    """Iterates over the rows behind the first `done` as records of one file.

    Raises ValueError for a dataset that cannot be had, naming the key.
    """

    done_bytes = 0  # nobody knows how many there are

    def __init__(self, settings: DataSettings, done: int) -> None:
        self._settings, self._done = settings, done

    def __iter__(self) -> Iterator[Record]:
        rows, s = load(self._settings), self._settings
        if rows.column_names is not None and s.column not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise ValueError(f"data.column: {s.dataset} has no {s.column}, but {names}; name one of these")
        number, name = self._done, Path(s.dataset or "").name
        try:
            for row in rows.skip(self._done):
                number += 1
                yield row_record(0, number, name, row.get(s.column))
        except (OSError, ConnectionError) as error:
            raise ValueError(
                f"data.dataset: {s.dataset} cannot be read after row {number} ({_first_line(error)}); the same command "
                "goes on from there"
            ) from None


def load(settings: DataSettings) -> Any:
    """The dataset: from a folder that `save_to_disk` wrote, or by whatever else `load_dataset` takes."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.source: datasets needs the library of this name, which is missing: {EXTRA}") from None
    s = settings
    assert s.dataset
    datasets.disable_progress_bars()
    try:
        if Path(s.dataset, "state.json").exists() or Path(s.dataset, "dataset_dict.json").exists():
            found = datasets.load_from_disk(s.dataset)
            rows = found[s.dataset_split] if isinstance(found, datasets.DatasetDict) else found
            return rows.to_iterable_dataset() if s.streaming else rows
        return datasets.load_dataset(
            s.dataset, s.dataset_name, split=s.dataset_split, revision=s.dataset_revision, streaming=s.streaming
        )
    except (ConnectionError, OSError) as error:
        raise ValueError(
            f"data.dataset: {s.dataset} cannot be had ({_first_line(error)}); check the name and the network, or name "
            "a folder on this machine"
        ) from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"data.dataset: {s.dataset}: {_first_line(error)}; check dataset_name and dataset_split"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
