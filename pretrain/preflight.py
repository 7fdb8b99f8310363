"""What must hold before training starts: a configuration that can run, data that is prepared, a run that may go on.

    python -m pretrain.preflight [hydra overrides]

prepares the data, unless it is to be prepared on the fly, prints nothing else, and exits with 2 and one message when
something has to be mended.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch

from data.prepare import Prepared, prepare
from data.settings import DataSettings
from pretrain.check import check
from pretrain.config import Config, ConfigError, load
from pretrain.distributed import LostPeer, world_size_from_env
from pretrain.machine import require_torch, require_usable_gpus
from pretrain.metrics import log_to_terminal
from pretrain.run_folder import RunFolder
from pretrain.trained import check_tokenizer

EXIT_CODE = 2
LOST_PEER = 3


def ready(config: Config, world_size: int) -> Prepared:
    """Check everything that can be checked without compute, and prepare the data.

    Raises:
        ValueError, OSError: with the key or file at fault and the mend.
    """
    check_run(config, world_size)
    prepared = prepare(data_settings(config))
    if config.train.init_from:
        check_tokenizer(config.train.init_from, prepared.tokenizer)
    return prepared


def check_run(config: Config, world_size: int) -> None:
    """What ``ready`` checks before it prepares.

    Raises:
        ValueError, OSError: with the key or file at fault and the mend.
    """
    check(config, world_size)
    RunFolder(config).check(config)


def data_settings(config: Config) -> DataSettings:
    """What the preparation is told of ``config``."""
    return DataSettings(**{f.name: getattr(config.data, f.name) for f in fields(DataSettings)})


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


def main() -> None:
    overrides = sys.argv[1:]
    log_to_terminal(is_main=True)
    with clear_errors():
        require_torch(torch.__version__)
        if only_asks_hydra(overrides):
            return
        config = load(overrides)
        if not config.train.dry_run:  # which prepares nothing, and checks by itself
            require_usable_gpus()
            (check_run if config.data.on_the_fly else ready)(config, world_size_from_env())


if __name__ == "__main__":
    main()
