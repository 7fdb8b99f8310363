"""Log lines and the progress bar on a terminal."""

import logging
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
console = Console(stderr=True)


def progress_bar(steps: int, first_step: int) -> Progress | None:
    """A started progress bar of a run that begins at ``first_step``; None when standard error is no terminal."""
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
    """Print the main process' log lines to standard error: plain, or above the progress bar on a terminal."""
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
    """Warns once when the file cannot be written, instead of a traceback for each line."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")  # names of files may be no valid UTF-8
        self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failing:
            self._failing = True  # before the warning, which is logged here too
            logger.warning("%s cannot be written; the run continues without it", self.baseFilename)


def log_to_file(path: Path) -> None:
    """Add log lines to the file at ``path`` too, and to no other file from now on."""
    root = logging.getLogger()
    for other in [handler for handler in root.handlers if isinstance(handler, _LogFile)]:
        root.removeHandler(other)  # of another run, or of this run before a rollback
        other.close()
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(handler)
