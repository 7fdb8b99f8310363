"""Log lines and the progress bar on a terminal."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)
console = Console(stderr=True)
SMOOTHING = 0.8  # weight of the earlier losses in the moving average next to the bar


class RunBar:
    """A progress bar on the terminal for a run of ``steps`` steps, of which ``first_step`` are already done.

    Call ``stop`` at the end of the run.
    """

    def __init__(self, steps: int, first_step: int):
        self._loss: float | None = None
        self._bar = Progress(
            *(BarColumn(bar_width=14), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
            *(TextColumn("left"), TextColumn("{task.fields[shown]}")),
            console=console, speed_estimate_period=300,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=steps, completed=first_step, shown="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``, the number of steps done."""
        self._bar.update(self._task, completed=step)

    def show(self, values: dict[str, float]) -> None:
        """Show ``values`` beside the bar, with "loss" as a moving average over the losses shown so far."""
        if math.isfinite(loss := values.get("loss", math.nan)):
            self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        if self._loss is not None:
            values = {**values, "loss": self._loss}
        self._bar.update(self._task, shown=as_text(values))

    def stop(self) -> None:
        self._bar.stop()


def run_bar(steps: int, first_step: int) -> RunBar | None:
    """A started ``RunBar``; None if standard error is not a terminal."""
    return RunBar(steps, first_step) if console.is_terminal else None


def as_text(values: dict[str, float]) -> str:
    """``values`` in one line, such as "loss 3.214 · tokens/s 12,345"; for the digits, see ``number``.

    Values whose names end in "/s" have no decimals from 10 on. A perplexity above 1e6 is written ">1e6".
    """
    return " · ".join(
        f"{name} {value:,.0f}"
        if name.endswith("/s") and value >= 10
        else f"{name} {number(value, '1e6' if name.endswith('perplexity') else '')}"
        for name, value in values.items()
    )


def number(value: float, most: str = "") -> str:
    """``value`` as text, with three decimals below 1000, and none from 1000 on.

    Args:
        most: a limit such as "1e6": a larger value is written ">1e6". "" for no limit.
    """
    if most and value > float(most):
        return f">{most}"
    return f"{value:,.{0 if value >= 1000 else 3}f}"


@contextmanager
def warnings_only() -> Iterator[None]:
    """A context in which only warnings and errors are logged: for models built in addition to the run's model."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


class _AboveTheBar(logging.Handler):
    """Prints lines above the progress bar. The terminal wraps long lines, so that commands in them can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(self.format(record), markup=False, soft_wrap=True)
        except Exception:  # a closed terminal must not end a run
            self.handleError(record)


def log_to_terminal(is_main: bool) -> None:
    """Print the log lines of the main process to standard error; on a terminal, above the progress bar.

    Other processes print nothing. A terminal does not show records with an attribute ``in_bar``, because the progress
    bar shows their values.
    """
    handler: logging.Handler = logging.NullHandler()
    if is_main and console.is_terminal:
        handler = _AboveTheBar()
        handler.addFilter(lambda record: not hasattr(record, "in_bar"))
    elif is_main:
        handler = logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(message)s", force=True)
    for noisy in ("torch", "git", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _LogFile(logging.FileHandler):
    """Warns once when the file cannot be written, instead of a traceback for each line."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")  # names of files may not be valid UTF-8
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # a library that sets up logging closed the file, and it cannot be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failing:
            self._failing = True  # before the warning, which is logged here too
            error = sys.exc_info()[1]  # logging calls this method while it handles the error
            logger.warning(
                "%s cannot be written (%s); the run continues, but this file may lack the following lines",
                *(self.baseFilename, getattr(error, "strerror", None) or error),
            )


def log_to_file(path: Path) -> None:
    """Also append all log lines to the file ``path``. The file of an earlier call gets no more lines."""
    root = logging.getLogger()
    for other in [handler for handler in root.handlers if isinstance(handler, _LogFile)]:
        root.removeHandler(other)  # of another run, or of this run before a rollback
        other.close()
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(handler)
