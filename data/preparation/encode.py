"""Records in, tokens out: in this process for little, else in as many as there are cores, in the records' order.

A worker is `python -m data.encode`, spoken to through its standard input and output: it shares no memory, lock or
thread with the process that asks, and ends when that one does, however it does.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from data.shards.reader import token_dtype
from data.sources.documents import Batch, Document, Parser, Record, digest
from data.tokenizer import Tokenizer

AHEAD = 2  # batches a worker, read and not yet written


class Encoded(NamedTuple):
    """The documents of a batch: `tokens` (n,) of all, each between bos and eos, and for every one its name, its
    number of tokens, its text's bytes, how many tokens of a prompt it begins with, and the digest of its content.

    `files` has for each document which file it is from. `problems` are the records that gave none.
    """

    tokens: np.ndarray
    names: list[str]
    lengths: list[int]
    text_bytes: list[int]
    given: list[int]
    digests: list[bytes]
    files: list[int]
    problems: list[Record]


class Encoder:
    """Batches of records to tokens, in this process, on `threads` (all cores, when None)."""

    def __init__(self, tokenizer: Tokenizer, parse: Parser, threads: int | None = None) -> None:
        self._tokenizer, self._parse, self._threads = tokenizer, parse, threads

    def __call__(self, records: list[Record]) -> Encoded:
        parsed = [(record, self._parse(record)) for record in records]
        documents = [(record.file, found) for record, found in parsed if isinstance(found, Document)]
        problems = [record._replace(content=None, problem=found) for record, found in parsed if isinstance(found, str)]
        made = [r.content for r in records if isinstance(r.content, np.ndarray)]
        texts = [document.text[document.given :] for _, document in documents]
        encoded = made or self._tokenizer.encode_batch(texts, self._threads)
        given = [np.empty(0, np.int32) for _ in documents]
        if self._parse.pairs:
            given = self._tokenizer.encode_batch([d.text[: d.given] for _, d in documents], self._threads)
        bos, eos = (np.array([token], np.int32) for token in (self._tokenizer.bos_id, self._tokenizer.eos_id))
        parts = [part for prompt, tokens in zip(given, encoded, strict=True) for part in (bos, prompt, tokens, eos)]
        return Encoded(
            tokens=np.concatenate([*parts, np.empty(0, np.int32)]).astype(token_dtype(self._tokenizer.vocab_size)),
            names=[document.name for _, document in documents],
            lengths=[2 + len(prompt) + len(tokens) for prompt, tokens in zip(given, encoded, strict=True)],
            text_bytes=[int(self._tokenizer.token_bytes[ids].sum()) for ids in made]
            or [len(document.text.encode()) for _, document in documents],
            given=[len(prompt) for prompt in given],
            digests=[digest(document) for _, document in documents],
            files=[file for file, _ in documents],
            problems=problems,
        )


@contextmanager
def encoders(tokenizer: Path, special: dict[str, str], parse: Parser, workers: int) -> Iterator["Workers"]:
    """The function that maps batches to tokens on `workers` processes."""
    pool = Workers(tokenizer, special, parse, workers)
    try:
        yield pool
    finally:
        pool.close()


class Workers:
    """Maps batches to tokens, in order, holding but a few of them; with one worker in this process.

    Raises OSError when a worker ends before its time.
    """

    def __init__(self, tokenizer: Path, special: dict[str, str], parse: Parser, count: int) -> None:
        self._count = count
        if count == 1:
            self._here = Encoder(Tokenizer(tokenizer, **special), parse)
            return
        command = [sys.executable, "-m", "data.preparation.encode"]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment(), "start_new_session": True}
        self._processes: list[subprocess.Popen] = [subprocess.Popen(command, **pipe) for _ in range(count)]  # type: ignore[call-overload]
        self._free: SimpleQueue[subprocess.Popen] = SimpleQueue()
        for process in self._processes:
            self._free.put(process)
            _send(process, (str(tokenizer), special, parse))
        self._threads = ThreadPoolExecutor(count)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        if self._count == 1:
            yield from ((batch, self._here(batch.records)) for batch in batches)
            return
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            waiting.append((batch, self._threads.submit(self._encode, batch.records)))
            if len(waiting) >= AHEAD * self._count:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def _encode(self, records: list[Record]) -> Encoded:
        process = self._free.get()
        try:
            _send(process, records)
            return pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise OSError(
                f"a process that tokenises ended with code {process.wait()}; with too little memory, lower data.workers"
            ) from None
        finally:
            self._free.put(process)

    def close(self) -> None:
        if self._count == 1:
            return
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()


def environment() -> dict[str, str]:
    """Of a process that runs a module of this package, wherever this one was started."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}


def _send(process: subprocess.Popen, what: Any) -> None:
    assert process.stdin
    pickle.dump(what, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def main() -> None:
    """Answer every list of records with its tokens until the asking process is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    questions = sys.stdin.buffer
    try:
        path, special, parse = pickle.load(questions)
        encode = Encoder(Tokenizer(path, **special), parse, threads=1)
        while True:
            pickle.dump(encode(pickle.load(questions)), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    from data.preparation import encode as this  # whose classes are then those of the process that asks

    this.main()
