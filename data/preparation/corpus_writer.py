"""Documents into shards, so that a killed process loses what it had in its hands and nothing else.

Tokens are appended to the shards in the order of the records, by one process. Now and then everything is flushed to
the disk, and then a file beside, `state.json`, is replaced by one that says how far records and shards are. Going on
means to cut the shards to those lengths and to read on behind that record.
"""

import ctypes
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.atomic import write_atomic
from data.preparation.encode import Encoded, encoders
from data.preparation.progress import progress
from data.shards.reader import token_dtype
from data.shards.writer import SplitWriter
from data.sources.corpus import Corpus, extended
from data.sources.documents import Batch
from data.sources.files import shorten
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STATE, HELD_OUT = "state.json", "held_out"
COMMIT_SECONDS = 1.0
NAMED = 1000  # of the skipped records, those that the manifest names
BYTES_A_WORKER = 2**22  # fewer are not worth starting a process


@dataclass
class State:
    """How far a preparation is: the last record that is in the shards, sums over those before, and the shards."""

    place: tuple[int, int] = (0, 0)
    chain: str = ""
    documents: int = 0
    bytes: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)
    skipped_counts: dict[str, int] = field(default_factory=dict)
    held_out: int = 0
    splits: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] | None = None
    """The latest of these that was within a file before the present one: what stays true if that turns out broken."""


class Writing:
    """Writes a corpus into shards in `folder`, from where an earlier call left it."""

    def __init__(self, folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._corpus, self._tokenizer = folder, corpus, tokenizer
        self.state = read_state(folder / STATE)
        self._committed: dict[str, Any] | None = asdict(self.state) if self.state.documents else None
        dtype = token_dtype(tokenizer.vocab_size)
        try:
            self._open(dtype, shard_tokens)
        except ValueError as error:
            logger.warning("%s; preparing from the start", error)
            (folder / STATE).unlink(missing_ok=True)  # who reads along is not to be told of what is made anew
            self.state, self._committed = State(), None
            self._open(dtype, shard_tokens)

    def _open(self, dtype: Any, shard_tokens: int) -> None:
        states = self.state.splits
        self._splits = {s: SplitWriter(self._folder, s, dtype, shard_tokens, states.get(s)) for s in ("train", "val")}
        file = self._folder / HELD_OUT
        known = file.read_bytes()[: 32 * self.state.held_out] if self.state.held_out and file.exists() else b""
        if len(known) < 32 * self.state.held_out:
            raise ValueError(f"{file}: is shorter than it was")
        self._held_out = {known[i : i + 32] for i in range(0, len(known), 32)}
        file.write_bytes(known)

    def __call__(self, workers: int) -> dict[str, list[dict[str, Any]]]:
        """Write all documents; returns the manifest's entries of the shards, by split."""
        corpus, state, said = self._corpus, self.state, time.monotonic()
        if state.documents:
            logger.info("going on behind %d documents", state.documents)
        if corpus.text_bytes:
            workers = max(1, min(workers, corpus.text_bytes // BYTES_A_WORKER))
        file, _ = state.place
        behind = sum(f.size for f in corpus.files[:file])
        try:
            with (
                encoders(self._tokenizer.path, self._tokenizer.special, corpus.parse, workers) as encode,
                progress("tokenising", corpus.total_bytes, behind) as advance,
            ):
                for batch, encoded in encode(corpus.batches(state.place)):
                    self._take(batch, encoded)
                    advance(batch.done_bytes, len(encoded.tokens))
                    if time.monotonic() >= said + COMMIT_SECONDS:
                        self._commit()
                        said = time.monotonic()
        except BaseException:
            for split in self._splits.values():
                split.abandon()
            raise
        for split in self._splits.values():
            split.close()
        return {name: split.entries for name, split in self._splits.items()}

    def _take(self, batch: Batch, encoded: Encoded) -> None:
        """Append the documents of a batch to their splits, and count what is skipped."""
        corpus, state, start = self._corpus, self.state, 0
        for record in encoded.problems:
            corpus.require_pair(record, record.problem)
            self._skip(record.problem, record.name)
        documents = zip(
            *(encoded.names, encoded.lengths, encoded.text_bytes, encoded.given, encoded.digests, encoded.files),
            strict=True,
        )
        for name, length, text_bytes, given, content, file in documents:
            tokens, start = encoded.tokens[start : start + length], start + length
            split = "val" if corpus.is_held_out(file, content) else "train"
            if corpus.own_validation and not self._may_be_in(split, content):
                self._skip("also in the validation files", name)
                continue
            state.chain = extended(state.chain, name, content)
            state.documents, state.bytes = state.documents + 1, state.bytes + text_bytes
            self._splits[split].add(name, tokens, text_bytes, given if corpus.parse.pairs else None)
        last = batch.records[-1]
        state.place = (last.file, last.number)

    def _may_be_in(self, split: str, content: bytes) -> bool:
        """Training leaves out what the validation files, which come first, hold as well."""
        if split == "train":
            return content not in self._held_out
        self._held_out.add(content)
        with open(self._folder / HELD_OUT, "ab") as file:
            file.write(content)
        self.state.held_out += 1
        return True

    def _skip(self, reason: str, name: str) -> None:
        names, counts = self.state.skipped.setdefault(reason, []), self.state.skipped_counts
        counts[reason] = counts.get(reason, 0) + 1
        if len(names) < NAMED:
            names.append(name)

    def _commit(self) -> None:
        state = self.state
        state.splits = {name: split.state() for name, split in self._splits.items()}
        if self._committed is not None and self._committed["place"][0] < state.place[0]:
            state.earlier = {**self._committed, "earlier": None}
        write_state(self._folder / STATE, state)
        self._committed = asdict(state)
        _give_back()

    def describe_skipped(self) -> str:
        """A few words on what was left out, for people; empty when nothing was."""
        counts = self.state.skipped_counts
        return "; ".join(
            f"{counts[reason]} {reason} ({shorten(names)})" for reason, names in self.state.skipped.items()
        )


def _give_back() -> None:
    """Let malloc return what lies free between pieces in use, which otherwise becomes more with a file's size."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def read_state(path: Path) -> State:
    """What the file says; nothing done when there is none, or none that can be read."""
    try:
        state = State(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return State()
    state.place = (state.place[0], state.place[1])
    return state


def write_state(path: Path, state: State) -> None:
    write_atomic(path, json.dumps(asdict(state)))
