"""Check a run before it starts, and prepare its data: ``python -m pretrain.preflight [key=value ...]``.

Prints one message and exits with 2 if a setting, a file or the machine must be fixed, and with 86 if the run is already
finished. Data that are prepared during training (data.on_the_fly=true) are only checked.
"""

import sys

from pretrain.cli.console import log_to_terminal
from pretrain.cli.errors import clear_errors
from pretrain.cli.machine import require_installed_torch, require_usable_gpus
from pretrain.cli.ranks import on_one_node_from_env, world_size_from_env
from pretrain.config.command_line import config_from
from pretrain.runs.folder import RunFolder

FINISHED = 86  # with this exit code, launch.sh starts no process


def main() -> None:
    log_to_terminal(is_main=True)
    with clear_errors():
        config = config_from(sys.argv[1:])
        if config.train.dry_run:  # a dry run makes these checks and needs no data
            return
        if on_one_node_from_env() and RunFolder(config).report_if_finished(config):
            sys.exit(FINISHED)
        require_installed_torch()
        require_usable_gpus()
        from pretrain.setup.data import check_run, ready

        (check_run if config.data.on_the_fly else ready)(config, world_size_from_env())


if __name__ == "__main__":
    main()
