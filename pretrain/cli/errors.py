"""Errors that a user can fix: one message and an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2
LOST_PEER = 3


class LostPeer(RuntimeError):
    """Another process of the run has died, hangs or is unreachable."""


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an error that the user can fix into its message on standard error and exit code 2; a lost process into 3.

    GRASS_TRACEBACK=1 shows the traceback instead.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, LostPeer) as error:
        if os.environ.get("GRASS_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        if isinstance(error, LostPeer):
            sys.stdout.flush()
            os._exit(LOST_PEER)
        sys.exit(EXIT_CODE)
