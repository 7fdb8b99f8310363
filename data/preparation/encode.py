"""Tokenise batches of records in the order of the records, in this process or in a pool of worker processes."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from data.shards.reader import token_dtype
from data.sources.documents import Batch, Document, Record, digest
from data.sources.parse_record import Parser
from data.tokenizer import Tokenizer

_NONE = np.empty(0, np.int32)
BATCHES_PER_WORKER = 2  # batches read but not yet written, which bounds the memory


class Encoded(NamedTuple):
    """The documents of a batch.

    Attributes:
        tokens: (n,) The tokens of all documents in order, each between bos and eos, in the dtype of the shards.
        names: The name of each document.
        lengths: The number of tokens of each document.
        text_bytes: The number of UTF-8 bytes of each document's text.
        given: For each document, the number of prompt tokens after bos.
        digests: The digest of each document's content.
        files: The number of the file of each document.
        problems: The records that gave no document, each with the reason as its `problem`.
        changed: The number of documents whose tokens decode to another text.
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
    """Parses and encodes records in this process, with `threads` threads as for ``Tokenizer.encode_batch``."""

    def __init__(self, tokenizer: Tokenizer, parse: Parser, threads: int | None = None) -> None:
        self._tokenizer, self._parse, self._threads = tokenizer, parse, threads

    def __call__(self, records: list[Record]) -> Encoded:
        parsed = [(record, self._parse(record)) for record in records]
        documents = [(record.file, found) for record, found in parsed if isinstance(found, Document)]
        problems = [record._replace(content=None, problem=found) for record, found in parsed if isinstance(found, str)]
        ready = [r.content for r in records if isinstance(r.content, np.ndarray)]  # already tokens
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

    def _changed(self, documents: list[Document], given: list[np.ndarray], encoded: list[np.ndarray]) -> int:
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
    """Yield a function that encodes batches: in this process if `workers` is 1, else in `workers` worker processes.

    The function yields each batch with its tokens, in the order of the batches, and holds a few batches per worker. It
    raises OSError if a worker ends early. Workers also end when this process is killed.
    """
    if workers == 1:
        encode = Encoder(tokenizer, parse)
        yield lambda batches: ((batch, encode(batch.records)) for batch in batches)
        return
    processes = [WorkerProcess(tokenizer, parse) for _ in range(workers)]
    free: SimpleQueue[WorkerProcess] = SimpleQueue()
    for process in processes:
        free.put(process)

    def encode_in_worker(records: list[Record]) -> Encoded:
        process = free.get()
        try:
            return process.encode(records)
        finally:
            free.put(process)

    threads = ThreadPoolExecutor(workers)
    try:
        yield lambda batches: _in_order(threads, encode_in_worker, batches, BATCHES_PER_WORKER * workers)
    finally:
        for process in processes:
            process.kill()  # first, so that no thread waits for an answer
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


def _in_order(
    threads: ThreadPoolExecutor, encode: Callable[[list[Record]], Encoded], batches: Iterable[Batch], ahead: int
) -> Iterator[tuple[Batch, Encoded]]:
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    for batch in batches:
        pending.append((batch, threads.submit(encode, batch.records)))
        if len(pending) >= ahead:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


class WorkerProcess:
    """A worker, `python -m data.preparation.encode_worker`, that encodes records and is connected by two pipes.

    A ProcessPoolExecutor would either fork a process that may have threads, or import the main module again in each
    worker. The latter runs a script without a main guard twice, and loads torch into each worker of a training command.
    This worker imports only the package `data`. It ends when its pipe closes, and the kernel closes the pipe even if
    the parent process is killed.
    """

    def __init__(self, tokenizer: Tokenizer, parse: Parser) -> None:
        command = [sys.executable, "-m", "data.preparation.encode_worker"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            start_new_session=True,  # signals for the group of this process, such as Ctrl-C, must not end the worker
        )
        self._send((tokenizer.path, tokenizer.special, parse))

    def encode(self, records: list[Record]) -> Encoded:
        """The documents and tokens of `records`. Raises OSError if the worker has ended."""
        try:
            self._send(records)
            return pickle.load(self._process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise OSError(
                f"a process that tokenises ended with code {code}; if memory ran out, lower data.workers"
            ) from None

    def _send(self, content: Any) -> None:
        assert self._process.stdin
        pickle.dump(content, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """After `kill`, wait until the process has ended, and close the pipes."""
        self._process.communicate()


def environment() -> dict[str, str]:
    """Environment variables with which a new process can import the package `data` in any working directory."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
