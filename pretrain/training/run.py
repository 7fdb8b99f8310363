"""A training run from its configuration to its exit code."""

import gc
from contextlib import nullcontext
from datetime import timedelta

from data.token_dataset import PreparedDataset
from pretrain.cli.errors import clear_errors
from pretrain.cli.machine import require_usable_gpus
from pretrain.cli.ranks import world_size_from_env
from pretrain.cli.signals import EXIT_CODE, StopRequest
from pretrain.config.schema import Config
from pretrain.distributed.lost_ranks import name_lost_ranks
from pretrain.distributed.world import World, connect, disconnect
from pretrain.runs.folder import RunFolder
from pretrain.setup.arithmetic import set_arithmetic
from pretrain.setup.data import prepare_data
from pretrain.setup.rank_agreement import require_same_setting
from pretrain.training.trainer import Outcome, Trainer


def train(config: Config) -> int:
    """Train with ``config`` on this process and the other processes of torchrun.

    An error that the user can fix is printed, and ends this process with code 2; the loss of another process of the run
    ends it with 3.

    Returns:
        The exit code: 0, or 85 (``EXIT_CODE`` of ``pretrain.cli.signals``) if a signal stopped the run.
    """
    stop = StopRequest()
    with clear_errors():
        require_usable_gpus()
        open_data = prepare_data(config, world_size_from_env())
        timeout = timedelta(minutes=config.train.timeout_minutes)
        world = connect(timeout)
        set_arithmetic(config, world.device)
        with name_lost_ranks(world, timeout, stop.__bool__), open_data(world) as data:
            finished = train_to_end(config, world, data, stop)
    # The trainer must be deleted before: DDP would hold the interpreter's lock while it releases gloo's process group.
    disconnect()
    return 0 if finished else EXIT_CODE


def train_to_end(config: Config, world: World, data: PreparedDataset, stop: StopRequest) -> bool:
    """Train, and restart from a checkpoint after each rollback. Returns False if a signal stopped the run."""
    folder = RunFolder(config)
    require_same_setting(config, data, world)
    if (step := world.broadcast_object(folder.finished_step(config.train.steps))) is not None:
        folder.log_finished(step)
        return True
    with folder.locked() if world.is_main else nullcontext():
        while (outcome := _train_once(config, world, data, folder, stop)) is Outcome.ROLLED_BACK:
            gc.collect()  # frees the memory of the model that was rolled back
        return outcome is Outcome.FINISHED


def _train_once(config: Config, world: World, data: PreparedDataset, folder: RunFolder, stop: StopRequest) -> Outcome:
    trainer = Trainer(config, world, data, folder, stop)
    stop.listen()
    try:
        return trainer.fit()
    finally:
        trainer.log.stop_bar()  # also after an error, because otherwise the terminal has no cursor
