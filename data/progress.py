"""How far a long piece of work is: a bar on a terminal, a log line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0


@contextmanager
def progress(action: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields the function that takes the bytes done since it was last called."""
    if sys.stderr.isatty():
        columns = TextColumn(action), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(action, total=total_bytes)
            yield lambda count: bar.advance(task, count)
        return
    done, said = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() > said + LOG_SECONDS:
            said = time.monotonic()
            logger.info("%s: %.1f of %.1f MB", action, done / 1e6, total_bytes / 1e6)

    yield advance
