"""Pretrain a LLaMA: ``torchrun … -m pretrain.train [hydra overrides]``, or ``./launch.sh [hydra overrides]``.

Exit codes: 0 finished, 2 something to mend (one message says what), 3 another process of the run was lost, 85 stopped
by a signal after saving.
"""

import gc
import logging
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta

import hydra
import torch
from omegaconf import DictConfig

from data.token_dataset import PreparedDataset
from pretrain.cli.console import log_to_terminal
from pretrain.cli.errors import clear_errors, only_asks_hydra
from pretrain.cli.machine import require_torch, require_usable_gpus
from pretrain.cli.signals import EXIT_CODE, StopRequest
from pretrain.config.compose import load, to_config
from pretrain.config.schema import Config
from pretrain.distributed import lost_ranks as peers
from pretrain.distributed import world as distributed
from pretrain.distributed.world import World
from pretrain.planner.plan import dry_run
from pretrain.runs.folder import RunFolder
from pretrain.setup.arithmetic import set_arithmetic
from pretrain.setup.consistency import require_same_setting
from pretrain.setup.data import data_of
from pretrain.training.guards import RolledBack
from pretrain.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train as ``config`` says; returns the exit code."""
    if config.train.dry_run:
        if distributed.is_main_from_env():
            with clear_errors():
                dry_run(config, distributed.world_size_from_env())
        return 0
    stop = StopRequest()
    log_to_terminal(is_main=distributed.is_main_from_env())
    with clear_errors():
        require_usable_gpus()
        data_from = data_of(config, distributed.world_size_from_env())
        timeout = timedelta(minutes=config.train.timeout_minutes)
        world = distributed.connect(timeout)
        set_arithmetic(config, world.device)
        with peers.named(world, timeout, stop.__bool__), data_from(world) as data:
            finished = _train(config, world, data, stop)
    # By now nothing is left of the trainer: the last to let go of gloo's process group must not be DDP, which holds the
    # interpreter's lock meanwhile.
    distributed.disconnect()
    return 0 if finished else EXIT_CODE


def _train(config: Config, world: World, data: PreparedDataset, stop: StopRequest) -> bool:
    """Returns whether the run is at its end."""
    folder = RunFolder(config)
    require_same_setting(config, data, world)
    if world.broadcast_object(folder.is_finished(config.train.steps)):
        logger.info(
            "%s is finished at step %d; raise train.steps or choose a new run.name", folder.path, config.train.steps
        )
        return True
    with folder.locked() if world.is_main else nullcontext():
        while (finished := _train_on(config, world, data, folder, stop)) is None:
            gc.collect()  # the model that went astray makes room
        return finished


def _train_on(config: Config, world: World, data: PreparedDataset, folder: RunFolder, stop: StopRequest) -> bool | None:
    """Build everything and train; None when the run is to go on from its newest checkpoint."""
    trainer = Trainer(config, world, data, folder, stop)
    stop.listen()
    try:
        return trainer.fit()
    except RolledBack:
        return None


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def hydra_main(cfg: DictConfig) -> None:
    sys.exit(run(to_config(cfg)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    overrides = sys.argv[1:]
    with clear_errors():
        require_torch(torch.__version__)
        if not only_asks_hydra(overrides):
            load(overrides)
    hydra_main()


if __name__ == "__main__":
    main()
