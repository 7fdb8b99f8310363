"""Pretrain a LLaMA: ``torchrun … -m pretrain.train [key=value ...]``, or ``./launch.sh [key=value ...]``.

Exit codes: 0 finished, 2 a setting or file to fix (one message names it), 3 another process of the run was lost, 85
stopped by a signal after saving.
"""

import signal
import sys

from pretrain.cli.console import log_to_terminal
from pretrain.cli.errors import clear_errors
from pretrain.cli.machine import require_installed_torch
from pretrain.cli.ranks import is_main_from_env, on_one_node_from_env, world_size_from_env
from pretrain.config.command_line import config_from
from pretrain.config.schema import Config
from pretrain.runs.folder import RunFolder


def run(config: Config) -> int:
    """Train with ``config``, or print the plan of a dry run; returns the exit code.

    A run that is already finished is reported without importing torch, which would take seconds.
    """
    log_to_terminal(is_main=is_main_from_env())
    with clear_errors():
        if config.train.dry_run:
            if is_main_from_env():
                from pretrain.planner.plan import dry_run

                dry_run(config, world_size_from_env())
            return 0
        # Processes on other nodes may not see this disk, so all processes ask the main process later.
        if on_one_node_from_env() and RunFolder(config).report_if_finished(config):
            return 0
        require_installed_torch()
    from pretrain.training.run import train

    return train(config)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    with clear_errors():
        config = config_from(sys.argv[1:])
    sys.exit(run(config))


if __name__ == "__main__":
    main()
