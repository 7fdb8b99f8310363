"""A training run from its configuration to its exit code."""

import gc
import logging
from contextlib import nullcontext
from datetime import timedelta

from data.token_dataset import PreparedDataset
from pretrain.cli.errors import clear_errors
from pretrain.cli.machine import require_usable_gpus
from pretrain.cli.ranks import world_size_from_env
from pretrain.cli.signals import EXIT_CODE, StopRequest
from pretrain.config.schema import Config
from pretrain.distributed import lost_ranks as peers
from pretrain.distributed import world as distributed
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.arithmetic import set_arithmetic
from pretrain.setup.consistency import require_same_setting
from pretrain.setup.data import data_of
from pretrain.training.guards import RolledBack
from pretrain.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train as ``config`` says, on this process and those that torchrun started with it; returns the exit code."""
    stop = StopRequest()
    with clear_errors():
        require_usable_gpus()
        data_from = data_of(config, world_size_from_env())
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
