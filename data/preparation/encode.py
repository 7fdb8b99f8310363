"""Tokenise batches of records in the order of the records, in this process or in a pool of worker processes."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np

from data.shards.reader import token_dtype
from data.sources.documents import Batch, Document, Parser, Record, digest
from data.tokenizer import Tokenizer

_NONE = np.empty(0, np.int32)
BATCHES_PER_WORKER = 2  # read ahead and not yet written: what bounds the memory


class Encoded(NamedTuple):
    """The documents of a batch.

    Attributes:
        tokens: (n,) of all documents in order, each between bos and eos, in the dtype of the shards.
        names: The name of each document.
        lengths: The number of tokens of each document.
        text_bytes: The UTF-8 bytes of each document's text.
        given: How many tokens after bos are a prompt, for each document.
        digests: The digest of each document's content.
        files: The number of the file that each document is from.
        problems: The records that gave no document.
        changed: The number of documents with tokens that decode to another text.
    """

    tokens: np.ndarray
    names: list[str]
    lengths: list[int]
    text_bytes: list[int]
    given: list[int]
    digests: list[bytes]
    files: list[int]
    problems: list[Record]
    changed: int


class Encoder:
    """Encodes batches of records in this process, on `threads` threads (all cores for None)."""

    def __init__(self, tokenizer: Tokenizer, parse: Parser, threads: int | None = None) -> None:
        self._tokenizer, self._parse, self._threads = tokenizer, parse, threads

    def __call__(self, records: list[Record]) -> Encoded:
        parsed = [(record, self._parse(record)) for record in records]
        documents = [(record.file, found) for record, found in parsed if isinstance(found, Document)]
        problems = [record._replace(content=None, problem=found) for record, found in parsed if isinstance(found, str)]
        ready = [r.content for r in records if isinstance(r.content, np.ndarray)]  # tokens of another program
        given, encoded = ([_NONE] * len(ready), ready) if ready else self._encode([found for _, found in documents])
        bos, eos = (np.array([token], np.int32) for token in (self._tokenizer.bos_id, self._tokenizer.eos_id))
        parts = [part for prompt, tokens in zip(given, encoded, strict=True) for part in (bos, prompt, tokens, eos)]
        return Encoded(
            tokens=np.concatenate([*parts, _NONE]).astype(token_dtype(self._tokenizer.vocab_size)),
            names=[document.name for _, document in documents],
            lengths=[2 + len(prompt) + len(tokens) for prompt, tokens in zip(given, encoded, strict=True)],
            text_bytes=[int(self._tokenizer.token_bytes[ids].sum()) for ids in ready]
            or [len(document.text.encode()) for _, document in documents],
            given=[len(prompt) for prompt in given],
            digests=[digest(document) for _, document in documents],
            files=[file for file, _ in documents],
            problems=problems,
            changed=0 if ready else self._changed([found for _, found in documents], given, encoded),
        )

    def _changed(
        self, documents: list[Document], given: Sequence[np.ndarray], encoded: Sequence[np.ndarray]
    ) -> int:
        parts = zip(documents, given, encoded, strict=True)
        return sum(not self._tokenizer.is_kept(document.text, *ids) for document, *ids in parts)

    def _encode(self, documents: list[Document]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The tokens of each document's prompt, and of the text that follows it."""
        prompts, texts = [d.text[: d.given] for d in documents], [d.text[d.given :] for d in documents]
        if self._parse.pairs:
            return self._tokenizer.encode_pairs(prompts, texts, self._threads)
        return [_NONE] * len(texts), self._tokenizer.encode_batch(texts, self._threads)


EncodeBatches = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Encoded]]]


@contextmanager
def encoders(tokenizer: Tokenizer, parse: Parser, workers: int) -> Iterator[EncodeBatches]:
    """Yield the function that encodes batches: in this process for one worker, else in `workers` processes.

    The function yields the batches in their order and holds a few of them per worker. It raises OSError when a worker
    process ends early. The workers end with this process, also when it is killed.
    """
    if workers == 1:
        encode = Encoder(tokenizer, parse)
        yield lambda batches: ((batch, encode(batch.records)) for batch in batches)
        return
    # Not forked: this process may have threads, and a copy of its memory would count for every worker.
    context, given = multiprocessing.get_context("spawn"), (tokenizer.path, tokenizer.special, parse)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=given)
    try:
        yield lambda batches: _encode_in(pool, batches, BATCHES_PER_WORKER * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in(pool: ProcessPoolExecutor, batches: Iterable[Batch], ahead: int) -> Iterator[tuple[Batch, Encoded]]:
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, pool.submit(_encode, batch.records)))
            if len(pending) >= ahead:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise OSError(
            "a process that tokenises was killed or ended early; with too little memory, lower data.workers"
        ) from None


_encoder: Encoder  # of a worker process


def _start_worker(tokenizer: Path, special: dict[str, str], parse: Parser) -> None:
    global _encoder
    Thread(target=_end_with_parent, daemon=True).start()
    os.setsid()  # signals for the parent's process group, such as Ctrl-C, are for the parent to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(Tokenizer(tokenizer, **special), parse, threads=1)


def _encode(records: list[Record]) -> Encoded:
    return _encoder(records)


def _end_with_parent() -> None:
    """A killed parent cannot shut down its pool, whose workers would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
