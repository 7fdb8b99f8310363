"""A preparation that goes on beside the run that trains on it, made by a process of its own.

That process is `python -m data.on_the_fly`; it takes the settings through its standard input, makes the preparation
that `python -m data.prepare` would make, gives way to training, and ends when the run does, however that ends.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from data.checks import examine
from data.loading.order import ENDLESS
from data.preparation import progress
from data.preparation.corpus_writer import STATE, read_state
from data.preparation.encode import environment
from data.preparation.plan import hashed, identity, marked_folder, marker_of, work_folder
from data.prepare import command, prepare
from data.settings import DataSettings
from data.shards.reader import token_dtype
from data.streaming.tokens import StreamedTokens, tokens_of
from data.token_dataset import PreparedDataset, load
from data.tokenizer import Tokenizer, find_tokenizer

logger = logging.getLogger(__name__)

COMMAND = [sys.executable, "-m", "data.streaming.background"]
NICE = 10
SAY_SECONDS = 60.0  # between two words on how far it is
ENDING_SECONDS = 5.0  # then it is killed, which costs no more than what is not written down yet


@dataclass(frozen=True)
class StreamedDataset(PreparedDataset):
    """What a run trains on while it is being prepared, or was before: the same tokens in the same order.

    `train` grows, `val` does not. `fingerprint` is of the settings: of the text, only what was read can be known.
    """

    train: StreamedTokens
    preparation: "BackgroundPreparation"


class BackgroundPreparation:
    """The preparation for these settings; with `start`, it is begun or gone on with unless it is whole.

    A context manager, behind which nothing is prepared any more.
    """

    def __init__(self, settings: DataSettings, start: bool) -> None:
        self._settings, (self._files, found) = settings, examine(settings)
        if found:
            raise ValueError("\n".join(found))
        self._marker = marker_of(settings, self._files)
        self._work = work_folder(settings, self._marker)
        self._process = self._start() if start and not self._places()[1] else None

    def _start(self) -> subprocess.Popen[str]:
        pipe: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(COMMAND, text=True, env=environment(), start_new_session=True, **pipe)
        assert process.stdin
        with process.stdin:
            json.dump({"parent": os.getpid(), "settings": asdict(self._settings)}, process.stdin)
        Thread(target=_pass_on, args=(process,), daemon=True).start()
        return process

    def _places(self) -> tuple[Path, Path | None]:
        return self._work, marked_folder(self._settings, self._marker)

    def dataset(self, validation_tokens: int) -> StreamedDataset | None:
        """What can be trained on by now; None while what to validate on is not there, which is the same ever after.

        That is all of the validation files, or the first tokens of the share that is held out, at the most so many.
        """
        work, whole = self._places()
        state, own = read_state(work / STATE), [[file.name, file.size] for file in self._files if file.held_out]
        if whole:
            tokenizer = load(whole).tokenizer
        elif (model := find_tokenizer(work)) and state.splits and state.place[0] >= len(own):
            try:
                tokenizer = Tokenizer(model)
            except ValueError:
                return None  # it was renamed just now
        else:
            return None
        dtype = token_dtype(tokenizer.vocab_size)
        most = validation_tokens if not own else ENDLESS if whole else tokens_of(state, "val")
        train, val = StreamedTokens("train", self._places, dtype), StreamedTokens("val", self._places, dtype, most)
        if not val.can_read(max(1, most)) or not train.can_read(1) or not tokenizer.path.exists():
            return None
        known = hashed("on the fly", identity(self._settings, self._files), own, tokenizer.sha256)
        return StreamedDataset(whole or work, tokenizer, train, val, known, {}, self)

    def problem(self) -> str | None:
        """Why nothing more will come, if it ended before its time."""
        code = self._process.poll() if self._process else None
        if not self._process or code is None or (code == 0 and self._places()[1]):
            return None
        if code == 0:
            return "data.paths: what they name changed while the run began, and was prepared so; start it again"
        assert self._process.stdout
        said = self._process.stdout.read().strip()
        reason = (
            said or f"data: the process that prepares it ended with code {code}; lower data.workers if memory is low"
        )
        return f"{reason} (so the preparation beside the run ended, and the run with it)"

    def prepared_tokens(self) -> int:
        """How many tokens to train on have been written."""
        return tokens_of(read_state(self._work / STATE), "train")

    def __enter__(self) -> "BackgroundPreparation":
        return self

    def __exit__(self, *error: object) -> None:
        if not self._process:
            return
        unfinished = self._process.poll() is None
        self._process.terminate()
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if unfinished:
            logger.info(
                "the preparation ended with the run; it has %s tokens to train on in %s. A run goes on with it, or %s",
                *(f"{self.prepared_tokens():,}", self._work, command(self._settings)),
            )


def _pass_on(process: subprocess.Popen[str]) -> None:
    """What the process says is said by the run."""
    assert process.stderr
    for line in process.stderr:
        logger.info("%s", line.rstrip())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)  # what is not written down yet is made again


def main() -> None:
    """Prepare; what is wrong with the text goes to standard output."""
    given = json.load(sys.stdin)
    Thread(target=_end_with, args=(given["parent"],), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.nice(NICE)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    progress.LOG_SECONDS = SAY_SECONDS
    try:
        prepare(DataSettings(**given["settings"]), read_along=True)
    except (ValueError, OSError) as error:
        print(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
