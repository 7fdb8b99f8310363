"""Errors that a user can fix: one message and an exit code."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

EXIT_CODE = 2
LOST_PEER = 3
CLOSED_PIPE = 141  # 128 + SIGPIPE, as shells report it


class LostPeer(RuntimeError):
    """Another process of the run has died, hangs or is unreachable."""


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def clear_errors() -> Iterator[None]:
    """A context that prints only the message of an error that the user can fix, and then exits with 2.

    These errors are ValueError, OSError and FloatingPointError, and ``LostPeer``, for which the exit code is 3. If the
    reader of standard output has ended, as after ``| head``, the process ends with 141 and without a message.
    Characters that the terminal's encoding lacks are printed as escapes. GRASS_TRACEBACK=1 shows tracebacks.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # now, while a closed pipe can still be handled
    except (ValueError, OSError, FloatingPointError, LostPeer) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_output():
            sys.exit(CLOSED_PIPE)
        if os.environ.get("GRASS_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        with suppress(OSError):  # standard error may be closed too
            print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LostPeer):
            os._exit(LOST_PEER)
        sys.exit(EXIT_CODE)


def _nobody_reads_output() -> bool:
    """Whether standard output is a pipe without a reader. If so, drops the output in its buffer."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed
