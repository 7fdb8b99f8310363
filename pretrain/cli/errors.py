"""Errors that a user can fix: one message and an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.config.schema import ConfigError


class LostPeer(RuntimeError):
    """Another process of the run is dead, stuck or gone."""


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


EXIT_CODE = 2
LOST_PEER = 3


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an error that the user can mend into its message on standard error and exit code 2; a lost process into 3.

    GRASS_TRACEBACK=1 shows where it came from.
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


def only_asks_hydra(arguments: list[str]) -> bool:
    """Whether there is a flag such as --help or --cfg among the arguments, which Hydra answers without a run.

    Raises:
        ConfigError: the flags of a multirun, which one launch cannot be.
    """
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError("a sweep is no run: start it with ./launch.sh -m, or python -m pretrain.sweep")
    return any(argument.startswith("-") for argument in arguments)
