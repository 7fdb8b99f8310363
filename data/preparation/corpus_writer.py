"""Write the documents of a corpus into shards, so that a killed process loses only the latest second of work.

One process appends tokens to the shards in the order of the records. About once a second it commits: it flushes the
shards to disk, and then replaces `state.json`, which contains the last record and the lengths of the shards. Resuming
truncates the shards to these lengths and continues reading after this record.
"""

import ctypes
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import write_atomic
from data.preparation.encode import Encoded, encoders
from data.preparation.progress_bar import progress
from data.shards.reader import token_dtype
from data.shards.writer import SplitWriter
from data.sources.corpus import Corpus, extended
from data.sources.documents import Batch
from data.sources.files import shorten
from data.tokenizer import Tokenizer
from data.wording import counted

logger = logging.getLogger(__name__)

STATE, HELD_OUT = "state.json", "held_out"
COMMIT_SECONDS = 1.0
MAX_SKIPPED_NAMES = 1000  # per reason, in the manifest
BYTES_PER_WORKER = 2**22  # with less text per worker, starting a process costs more time than it saves
DIGEST_BYTES = 32


@dataclass
class WriterState:
    """The progress of a preparation, as stored in `state.json`, from which a later call resumes.

    `place` = (file, number of its last record that is processed). Earlier files are complete.
    """

    place: tuple[int, int] = (0, 0)
    chain: str = ""
    """The hash of the names and texts of all documents so far."""
    documents: int = 0
    bytes: int = 0
    """The number of UTF-8 bytes of the documents' texts."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """By reason, the names of the first 1000 skipped records. `skipped_counts` has the number of all."""
    skipped_counts: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    """The number of documents whose tokens decode to another text."""
    held_out: int = 0
    """The number of documents from separate validation files."""
    splits: dict[str, Any] = field(default_factory=dict)
    """By split, the result of `SplitWriter.state`."""
    earlier: dict[str, Any] | None = None
    """The latest state within an earlier file. It stays valid if the current file turns out to be broken."""


class CorpusWriter:
    """Writes a corpus into shards in `folder`, and resumes where an earlier writer was interrupted.

    A shard ends with the document that reaches `shard_tokens` tokens. `state` is the `WriterState`.
    """

    def __init__(self, folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._corpus, self._tokenizer = folder, corpus, tokenizer
        self.state = read_state(folder / STATE)
        self._committed: dict[str, Any] | None = asdict(self.state) if self.state.documents else None
        dtype = token_dtype(tokenizer.vocab_size)
        try:
            self._open(dtype, shard_tokens)
        except ValueError as error:
            logger.warning("%s; preparing from the start", error)
            (folder / STATE).unlink(missing_ok=True)  # a run must not read shards that will be rewritten
            self.state, self._committed = WriterState(), None
            self._open(dtype, shard_tokens)

    def _open(self, dtype: np.dtype, shard_tokens: int) -> None:
        states = self.state.splits
        self._splits = {s: SplitWriter(self._folder, s, dtype, shard_tokens, states.get(s)) for s in ("train", "val")}
        file, length = self._folder / HELD_OUT, DIGEST_BYTES * self.state.held_out
        digests = file.read_bytes()[:length] if length and file.exists() else b""
        if len(digests) < length:
            raise ValueError(f"{file} is shorter than it was")
        self._held_out = {digests[i : i + DIGEST_BYTES] for i in range(0, length, DIGEST_BYTES)}
        file.write_bytes(digests)

    def write(self, workers: int) -> dict[str, list[dict[str, Any]]]:
        """Write all documents that are not written yet. At most `workers` processes tokenise; 1 means this process.

        Returns:
            For each split, the entries of its shards in the manifest, as from `ShardWriter.entry`.

        Raises:
            ValueError: A file of the corpus cannot be read, or a line of instructions is broken.
            OSError: The disk is full or fails, or a worker process was killed.
        """
        corpus, state, committed_at = self._corpus, self.state, time.monotonic()
        if state.documents:
            logger.info("resuming after %s", counted(state.documents, "document"))
        if corpus.text_bytes:
            workers = max(1, min(workers, corpus.text_bytes // BYTES_PER_WORKER))
        file, _ = state.place
        done_bytes = sum(f.size for f in corpus.files[:file])
        try:
            with (
                encoders(self._tokenizer, corpus.parse, workers) as encode,
                progress("tokenising", corpus.total_bytes, done_bytes) as advance,
            ):
                for batch, encoded in encode(corpus.batches(state.place)):
                    self._add(batch, encoded)
                    advance(batch.done_bytes, len(encoded.tokens))
                    if time.monotonic() >= committed_at + COMMIT_SECONDS:
                        self._commit()
                        committed_at = time.monotonic()
        except BaseException:
            for split in self._splits.values():
                split.abandon()
            raise
        for split in self._splits.values():
            split.close()
        return {name: split.entries for name, split in self._splits.items()}

    def _add(self, batch: Batch, encoded: Encoded) -> None:
        """Append the documents of a batch to their splits, and count skipped documents."""
        corpus, state, start = self._corpus, self.state, 0
        state.changed += encoded.changed
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
        """Whether a document may be in a split: training must not contain documents of the validation files.

        The validation files come first in the corpus, so all their digests are known before the training documents.
        """
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
        if len(names) < MAX_SKIPPED_NAMES:
            names.append(name)

    def _commit(self) -> None:
        state = self.state
        state.splits = {name: split.state() for name, split in self._splits.items()}
        if self._committed is not None and self._committed["place"][0] < state.place[0]:
            state.earlier = {**self._committed, "earlier": None}
        write_state(self._folder / STATE, state)
        self._committed = asdict(state)
        _return_free_memory()

    def describe_skipped(self) -> str:
        """The number of skipped documents per reason, and some of their names; empty if none was skipped."""
        counts = self.state.skipped_counts
        return "; ".join(
            f"{counts[reason]} {reason} ({shorten(names)})" for reason, names in self.state.skipped.items()
        )


def _return_free_memory() -> None:
    """Let glibc's malloc return free memory to the system. Otherwise memory would grow with the size of a file."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def read_state(path: Path) -> WriterState:
    """The state in a file; an empty state if there is no file or it cannot be read."""
    try:
        state = WriterState(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return WriterState()
    state.place = (state.place[0], state.place[1])
    return state


def write_state(path: Path, state: WriterState) -> None:
    write_atomic(path, json.dumps(asdict(state)))
