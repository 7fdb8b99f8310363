"""Where the numbers of a run go: metrics.jsonl always, W&B when it can, a progress bar on a terminal.

Only the main process writes.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain.config import Config
from pretrain.run_folder import RunFolder
from pretrain.wandb_run import WandbRun

logger = logging.getLogger(__name__)
console = Console(stderr=True)


class Stopwatch:
    """Seconds and tokens of training since the last ``lap``, with pauses for evaluation and checkpoints left out."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self.total_seconds = self._seconds = 0.0
        self._tokens = self._steps = 0
        self._since: float | None = None

    def start(self) -> None:
        self._since = self._clock()

    def stop(self, tokens: int) -> None:
        """End the step that ``start`` began; it trained on ``tokens``."""
        assert self._since is not None
        seconds = self._clock() - self._since
        self._seconds, self.total_seconds = self._seconds + seconds, self.total_seconds + seconds
        self._tokens, self._steps = self._tokens + tokens, self._steps + 1

    def lap(self) -> tuple[float, float]:
        """(tokens per second, seconds per step) since the last lap."""
        rates = self._tokens / self._seconds, self._seconds / self._steps
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return rates


class Lines:
    """Appends JSON lines to a file. What the disk does not take is said once, kept, and written when it can be."""

    def __init__(self, path: Path):
        self.path, self._pending, self._failing = path, b"", False

    def write(self, line: dict[str, Any]) -> None:
        self._pending += json.dumps(line).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:  # each time: the folder may have been away
                while self._pending:
                    self._pending = self._pending[file.write(self._pending) :]
        except OSError as error:
            if not self._failing:
                logger.warning("%s cannot be written (%s); the run goes on and keeps its lines", self.path, error)
            self._failing = True
        else:
            if self._failing:
                logger.warning("%s can be written again; no line is lost", self.path)
            self._failing = False


class MetricLog:
    """Writes a run's metric lines to ``metrics.jsonl`` and to W&B, and shows them to whoever watches."""

    def __init__(self, folder: RunFolder, config: Config, first_step: int):
        self._lines, self._selection = Lines(folder.metrics_file), Lines(folder.selection_file)
        self._bad_batches = Lines(folder.bad_batches_file)
        self._wandb = WandbRun(config, folder.path)
        self._bar = _progress_bar(config.train.steps, first_step)

    def write(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        line = {"step": step, "tokens": tokens, **values}
        self._lines.write(line)
        self._wandb.log(line)

    def write_selection(self, step: int, layers: dict[str, Any]) -> None:
        """A line of ``selection.jsonl``: what the refreshes since the last one chose, by layer."""
        if layers:
            self._selection.write({"step": step, "layers": layers})

    def write_bad_batch(self, line: dict[str, Any]) -> None:
        self._bad_batches.write(line)

    def advance(self, step: int, shown: dict[str, float]) -> None:
        """Move the bar to ``step``, or, without a terminal, say ``shown`` in a plain line."""
        text = " · ".join(f"{name} {value:,.{0 if value >= 1000 else 3}f}" for name, value in shown.items())
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, shown=text)
        if text:
            logger.info("step %d · %s", step, text, extra={"in_bar": True})

    def show_results(self, samples: list[tuple[str, str]]) -> None:
        """Show what a finished run came to, where tables and pictures can be shown."""
        self._wandb.log_results(samples)

    def close(self, summary: dict[str, Any]) -> None:
        if self._bar:
            self._bar.stop()
        self._wandb.finish(summary)


def _progress_bar(steps: int, first_step: int) -> Progress | None:
    if not console.is_terminal:
        return None
    bar = Progress(
        *(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[shown]}"),
        console=console,
    )
    bar.add_task("training", total=steps, completed=first_step, shown="")
    bar.start()
    return bar


def log_to_terminal(is_main: bool) -> None:
    """Send the main process' log lines to standard error: plain, or above the progress bar on a terminal."""
    handler: logging.Handler = logging.NullHandler()
    if is_main and console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        handler.addFilter(lambda record: not hasattr(record, "in_bar"))
    elif is_main:
        handler = logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(message)s", force=True)
    for noisy in ("torch", "git", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _LogFile(logging.FileHandler):
    """Says once that the disk does not take its lines, instead of a traceback for each."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8")
        self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failing:
            self._failing = True  # before the warning, which comes here too
            logger.warning("%s cannot be written; the run goes on", self.baseFilename)


def log_to_file(path: Path) -> None:
    root = logging.getLogger()
    for other in [
        h for h in root.handlers if isinstance(h, _LogFile)
    ]:  # of this run before it went back, or of another
        root.removeHandler(other)
        other.close()
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(handler)
