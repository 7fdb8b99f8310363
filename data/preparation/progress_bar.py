"""Show the progress of a long task: a bar on a terminal, a log line every few seconds elsewhere."""

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
def progress(action: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a task.

    Yields a function to call with the bytes done so far and the tokens made since the last call.

    Args:
        action: The name of the task in the bar or the log line.
        total_bytes: The bytes of the complete task; 0 if unknown.
        done_bytes: Bytes done before the start. They are not part of the speed, which gives the remaining time.
    """
    began, tokens = time.monotonic(), 0
    if sys.stderr.isatty():
        columns = TextColumn(action), BarColumn(), TransferSpeedColumn(), TextColumn("{task.fields[speed]}")
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(action, total=total_bytes or None, completed=done_bytes, speed="")

            def advance_bar(done: int, count: int) -> None:
                nonlocal tokens
                tokens += count
                bar.update(task, completed=done, speed=f"{tokens / (time.monotonic() - began + 1e-9):,.0f} tokens/s")

            yield advance_bar
        return
    logged = began

    def advance_log(done: int, count: int) -> None:
        nonlocal tokens, logged
        tokens, now = tokens + count, time.monotonic()
        if now > logged + LOG_SECONDS:
            logged, seconds = now, now - began
            pace = max(1, done - done_bytes) / seconds
            left = f", {max(0, total_bytes - done) / pace:,.0f} s left" if total_bytes else ""
            of = f" of {total_bytes / 1e6:,.1f}" if total_bytes else ""
            logger.info(
                "%s: %s%s MB, %s tokens/s%s", action, f"{done / 1e6:,.1f}", of, f"{tokens / seconds:,.0f}", left
            )

    yield advance_log
