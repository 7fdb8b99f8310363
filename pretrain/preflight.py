"""What must hold before training starts: a configuration that can run, data that is prepared, a run that may go on.

    python -m pretrain.preflight [hydra overrides]

prepares the data, unless it is to be prepared on the fly, prints nothing else, and exits with 2 and one message when
something has to be mended.
"""

import sys

import torch

from pretrain.cli.console import log_to_terminal
from pretrain.cli.errors import clear_errors, only_asks_hydra
from pretrain.cli.machine import require_torch, require_usable_gpus
from pretrain.config.compose import load
from pretrain.distributed.world import world_size_from_env
from pretrain.setup.data import check_run, ready


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
