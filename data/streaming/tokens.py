"""Read a split while it is being prepared.

Reads only tokens within the lengths in `state.json`: they are on disk and never change. When the preparation is
complete, its folder is renamed, and reading continues under the new name.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.preparation.corpus_writer import STATE, WriterState, read_state
from data.preparation.plan import PreparationPlan
from data.shards.reader import Shard, Tokens
from data.token_dataset import load

RENAME_SECONDS = 10.0  # maximum time until a network file system shows the new name of a folder
T = TypeVar("T")


class StreamedTokens(Tokens):
    """The tokens of a split that is being prepared, as far as they are on disk. `len` grows when `can_read` is called.

    Any number of threads may read at the same time.

    Args:
        split: `train` or `val`.
        plan: The plan of the preparation that writes the split.
        dtype: The dtype of the shards.
        limit: Maximum number of tokens to read, from the beginning of the split.
    """

    def __init__(self, split: str, plan: PreparationPlan, dtype: np.dtype, limit: int = sys.maxsize) -> None:
        super().__init__([], dtype, limit=limit)
        self._split, self._plan = split, plan
        self._closed: dict[str, Shard] = {}
        self.complete = False

    def can_read(self, stop: int) -> bool:
        if not self.complete and self._total < stop:
            self._update(stop)
        return self.complete or self._total >= stop

    def _update(self, stop: int) -> None:
        if finished := self._plan.finished():
            self._join(getattr(load(finished), self._split).shards)
            self.complete = True
            return
        work = self._plan.work_folder
        try:
            state = read_state(work / STATE)
            if self._split in state.splits and token_count(state, self._split) >= max(stop, self._total):
                self._join(self._shards_in(work, state.splits[self._split]))
        except (FileNotFoundError, ValueError):  # the folder is being renamed, or is damaged and will be written again
            pass

    def _shards_in(self, work: Path, state: dict[str, Any]) -> list[Shard]:
        names = [entry["name"] for entry in state["shards"]]
        for name in names:
            if name not in self._closed:
                self._closed[name] = Shard(work, name, self.dtype)
        found = [self._closed[name] for name in names]
        if state["open"]["documents"]:
            found.append(Shard(work, f"{self._split}-{len(names):05d}", self.dtype, state["open"]))
        return found

    def __getitem__(self, where: slice) -> np.ndarray:
        return self._read(Tokens.__getitem__, where)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self._read(Tokens.document_starts, start, stop)

    def documents(self, start: int, stop: int) -> list[str]:
        return self._read(Tokens.documents, start, stop)

    def _read(self, method: Callable[..., T], *arguments: object) -> T:
        """The result of a method of Tokens, which is called again if the folder is renamed during the call."""
        deadline = time.monotonic() + RENAME_SECONDS
        while True:
            shards = self.shards
            try:
                return method(self, *arguments)
            except FileNotFoundError:
                if shards is self.shards and (self.complete or time.monotonic() > deadline):
                    raise
            self._update(0)
            time.sleep(0.01)


def token_count(state: WriterState, split: str) -> int:
    """The number of tokens of `split` that are on disk according to `state`; 0 if nothing is written yet."""
    found = state.splits.get(split, {"shards": [], "open": {"tokens": 0}})
    return sum(entry["tokens"] for entry in [*found["shards"], found["open"]])
