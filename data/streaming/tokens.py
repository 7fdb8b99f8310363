"""A split that is read while a preparation still writes it, and an order of its windows that needs no end.

What `state.json` names is on the disk and stays, to the byte, whatever is killed: no more than that is read. When the
preparation is whole its folder has another name, under which reading goes on.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.loading.order import ENDLESS
from data.preparation.corpus_writer import STATE, State, read_state
from data.shards.reader import Shard, Tokens
from data.token_dataset import load

PATIENCE = 10.0  # seconds that a network's file system may take to show a folder's new name
T = TypeVar("T")


class StreamedTokens(Tokens):
    """As many tokens of a split as are on the disk, at the most `most`; `can_read` takes in what came since.

    `places` tells the folder that is written and, once there is one, that of the whole. Any threads may read meanwhile.
    """

    def __init__(
        self, split: str, places: Callable[[], tuple[Path, Path | None]], dtype: np.dtype, most: int = ENDLESS
    ) -> None:
        self._split, self._places, self._most = split, places, most
        self._join([], dtype)
        self.parts = []
        self._closed: dict[str, Shard] = {}
        self.complete = False
        """Whether no more will come."""

    def can_read(self, stop: int) -> bool:
        """Whether the tokens before `stop`, or all there will ever be, can be read by now."""
        if not self.complete and super().__len__() < stop:
            self._look(stop)
        return self.complete or super().__len__() >= stop

    def _look(self, stop: int) -> None:
        work, whole = self._places()
        if whole:
            self._join(getattr(load(whole), self._split)._shards, self._dtype)
            self.complete = True
            return
        try:
            state = read_state(work / STATE)
            if self._split in state.splits and tokens_of(state, self._split) >= max(stop, super().__len__()):
                self._join(self._shards_in(work, state.splits[self._split]), self._dtype)
        except (FileNotFoundError, ValueError):  # about to be renamed, or damaged and about to be made anew
            pass

    def _shards_in(self, work: Path, state: dict[str, Any]) -> list[Shard]:
        names = [entry["name"] for entry in state["shards"]]
        for name in names:
            if name not in self._closed:
                self._closed[name] = Shard(work, name, self._dtype)
        found = [self._closed[name] for name in names]
        if state["open"]["documents"]:
            found.append(Shard(work, f"{self._split}-{len(names):05d}", self._dtype, state["open"]))
        return found

    def __len__(self) -> int:
        return min(self._most, super().__len__())

    def __getitem__(self, where: slice) -> np.ndarray:
        return self._read(Tokens.__getitem__, where)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self._read(Tokens.document_starts, start, stop)

    def documents(self, start: int, stop: int) -> list[str]:
        return self._read(Tokens.documents, start, stop)

    def _read(self, method: Callable[..., T], *given: object) -> T:
        deadline = time.monotonic() + PATIENCE
        while True:
            shards = self._shards
            try:
                return method(self, *given)
            except FileNotFoundError:  # the folder may have its new name
                if shards is self._shards and (self.complete or time.monotonic() > deadline):
                    raise
            self._look(0)
            time.sleep(0.01)


def tokens_of(state: State, split: str) -> int:
    """How many tokens of a split are on the disk."""
    found = state.splits.get(split, {"shards": [], "open": {"tokens": 0}})
    return sum(entry["tokens"] for entry in [*found["shards"], found["open"]])
