"""What must hold before training starts: a configuration that can run, data that is prepared, a run that may go on.

    python -m pretrain.preflight [hydra overrides]

prepares the data, prints nothing else, and exits with 2 and one message when something has to be mended.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from data.prepare import Prepared, prepare
from data.settings import DataSettings
from pretrain.config import Config, ConfigError, check, load
from pretrain.distributed import world_size_from_env
from pretrain.metrics import log_to_terminal
from pretrain.run_folder import RunFolder

EXIT_CODE = 2


def ready(config: Config, world_size: int) -> Prepared:
    """Check everything that can be checked without compute, and prepare the data.

    Raises:
        ValueError, OSError: with the key or file at fault and the mend.
    """
    check(config, world_size)
    RunFolder(config).check(config)
    data = prepare(DataSettings(**{f.name: getattr(config.data, f.name) for f in fields(DataSettings)}))
    if data.tokenizer.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {data.folder} has {data.tokenizer.vocab_size} tokens, "
            f"the model {config.model.vocab_size}; set model.vocab_size={data.tokenizer.vocab_size}, "
            "or leave data.vocab_size and data.tokenizer unset"
        )
    return data


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an error that the user can mend into its message on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def main() -> None:
    overrides = sys.argv[1:]
    if any(o.startswith("-") for o in overrides):  # flags such as --cfg are for Hydra to answer
        return
    log_to_terminal(is_main=True)
    with clear_errors():
        ready(load(overrides), world_size_from_env())


if __name__ == "__main__":
    main()
