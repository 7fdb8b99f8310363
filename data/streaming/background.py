"""Train while a separate process prepares the corpus.

The process is `python -m data.streaming.background`. It reads the settings from standard input, makes the same
preparation as `python -m data.prepare` at a lower priority, and ends with the run, however the run ends.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Any

from data.loading.order import ENDLESS
from data.preparation import progress_bar
from data.preparation.corpus_writer import STATE, read_state
from data.preparation.encode import environment
from data.preparation.plan import PreparationPlan, hash_of
from data.prepare import command, manifests, prepare
from data.settings import DataSettings
from data.shards.reader import Tokens, token_dtype
from data.streaming.tokens import StreamedTokens, token_count
from data.token_dataset import PreparedDataset, load
from data.tokenizer import Tokenizer, find_tokenizer

logger = logging.getLogger(__name__)

COMMAND = [sys.executable, "-m", "data.streaming.background"]
NICE = 10
LOG_SECONDS = 60.0  # between two lines on the progress of the preparation
END_SECONDS = 5.0  # for the process to end; then it is killed, which loses only tokens that are not committed


@dataclass(frozen=True)
class StreamedDataset(PreparedDataset):
    """A dataset to train on while it is prepared, or after it is complete: the tokens and their order are the same.

    `train` grows, `val` does not. `fingerprint` depends only on the settings, the tokenizer, and the names and sizes of
    separate validation files, because not all of the text has been read yet.
    """

    train: StreamedTokens
    preparation: "BackgroundPreparation"


class BackgroundPreparation:
    """The preparation for `settings`, made by a separate process while this process trains.

    With `start`, the process is started, unless the preparation is complete; it resumes an interrupted preparation.
    Without `start`, the preparation is only read: only one rank of a run starts the process.

    A context manager; its end stops the process and waits until it has ended.

    Raises:
        ValueError: The settings have problems; one line each.
    """

    def __init__(self, settings: DataSettings, start: bool) -> None:
        self.plan = PreparationPlan(settings)
        self.plan.require_no_problems()
        self._process = self._start() if start and not self.plan.finished() else None

    def _start(self) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(COMMAND, text=True, env=environment(), start_new_session=True, **pipes)
        assert process.stdin
        with suppress(BrokenPipeError), process.stdin:  # `problem` says why a process has ended
            json.dump({"parent": os.getpid(), "settings": asdict(self.plan.settings)}, process.stdin)
        Thread(target=_log_output, args=(process,), daemon=True).start()
        return process

    def dataset(self, validation_tokens: int) -> StreamedDataset | None:
        """The part of the dataset that is prepared; None while `val` is incomplete or `train` has no tokens yet.

        The validation split never changes: all separate validation files, or at most the first `validation_tokens`
        tokens of the held-out documents.
        """
        plan, finished = self.plan, self.plan.finished()
        work, own = plan.work_folder, plan.validation_files
        state = read_state(work / STATE)
        if finished:
            tokenizer = load(finished).tokenizer
        elif (model := find_tokenizer(work)) and state.splits and state.place[0] >= len(own):
            try:
                tokenizer = Tokenizer(model)
            except ValueError:
                return None  # the folder has just been renamed
        else:
            return None
        dtype = token_dtype(tokenizer.vocab_size)
        limit = validation_tokens if not own else ENDLESS if finished else token_count(state, "val")
        train, val = StreamedTokens("train", plan, dtype), StreamedTokens("val", plan, dtype, limit)
        if not val.can_read(max(1, limit)) or not train.can_read(1) or not tokenizer.path.exists():
            return None
        fingerprint = hash_of("on the fly", plan.identity, own, tokenizer.sha256)
        return StreamedDataset(finished or work, tokenizer, train, val, fingerprint, {}, self)

    def problem(self) -> str | None:
        """Why the preparation ended early; None while it is running and after it is complete."""
        code = self._process.poll() if self._process else None
        if not self._process or code is None or (code == 0 and self.plan.finished()):
            return None
        if code == 0:
            return "data.paths: files changed while the run started; start the run again"
        assert self._process.stdout
        reason = self._process.stdout.read().strip() or (
            f"data: the process that prepares the data ended with code {code}; if memory ran out, lower data.workers"
        )
        return f"{reason} (the preparation in the background ended, and the run with it)"

    def prepared_tokens(self) -> int:
        """The number of training tokens on disk while the preparation is incomplete; 0 after it is complete."""
        return token_count(read_state(self.plan.work_folder / STATE), "train")

    def __enter__(self) -> "BackgroundPreparation":
        return self

    def __exit__(self, *error: object) -> None:
        if not self._process:
            return
        unfinished = self._process.poll() is None
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if unfinished:
            logger.info(
                "the preparation stopped with the run; %s has %s training tokens. It continues when the run is "
                "resumed. To continue it without the run: %s",
                *(self.plan.work_folder, f"{self.prepared_tokens():,}", command(self.plan.settings)),
            )


def find_streamed(settings: DataSettings, fingerprint: str, validation_tokens: int) -> PreparedDataset | None:
    """Find the complete preparation that a run has read while it was being written (data.on_the_fly=true).

    The corpus and the tokenizer need not exist.

    Args:
        fingerprint: The fingerprint of the run's `StreamedDataset`.
        validation_tokens: The maximum number of validation tokens that the run uses.

    Returns:
        The dataset, with `fingerprint`. Unless it has separate validation files, its validation split is cut to
        `validation_tokens`. None if `settings.root` has no such preparation.

    Raises:
        ValueError: The preparation is damaged.
    """
    for folder, manifest in manifests(settings.root):
        own = manifest.get("validation_files", [])
        if hash_of("on the fly", manifest["identity"], own, manifest["tokenizer"]["sha256"]) == fingerprint:
            dataset = load(folder)
            val = dataset.val if own else Tokens(dataset.val.shards, dataset.val.dtype, limit=validation_tokens)
            return replace(dataset, val=val, fingerprint=fingerprint)
    return None


def _log_output(process: subprocess.Popen[str]) -> None:
    assert process.stderr
    for line in process.stderr:
        logger.info("%s", line.rstrip())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)  # tokens that are not committed yet are encoded again later


def main() -> None:
    """Prepare, as the background process. Errors of the text or the disk are written to standard output."""
    given = json.load(sys.stdin)
    Thread(target=_end_with, args=(given["parent"],), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.nice(NICE)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    progress_bar.LOG_SECONDS = LOG_SECONDS
    try:
        prepare(DataSettings(**given["settings"]), read_along=True)
    except (ValueError, OSError) as error:
        print(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
