"""Pretrain a LLaMA: ``torchrun … -m pretrain.train [hydra overrides]``, or ``./launch.sh [hydra overrides]``.

Exit codes: 0 finished, 2 something to mend (one message says what), 85 stopped by a signal after saving.
"""

import logging
import signal
import sys
from contextlib import nullcontext

import hydra
from omegaconf import DictConfig

from pretrain import distributed
from pretrain.config import Config, load, to_config
from pretrain.interrupt import EXIT_CODE, StopRequest
from pretrain.metrics import log_to_terminal
from pretrain.preflight import clear_errors, only_asks_hydra, ready
from pretrain.run_folder import RunFolder
from pretrain.trainer import Trainer

logger = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train as ``config`` says; returns the exit code."""
    stop = StopRequest()
    log_to_terminal(is_main=distributed.is_main_from_env())
    with clear_errors():
        data = ready(config, distributed.world_size_from_env())
        world, folder = distributed.connect(), RunFolder(config)
        if world.from_main(folder.is_finished(config.train.steps)):
            logger.info(
                "%s is finished at step %d; raise train.steps or choose a new run.name", folder.path, config.train.steps
            )
            distributed.disconnect()
            return 0
        with folder.locked() if world.is_main else nullcontext():
            trainer = Trainer(config, world, data, folder, stop)
            stop.listen()
            finished = trainer.fit()
    del trainer  # the last to let go of gloo's process group must not be DDP: it holds the interpreter's lock meanwhile
    distributed.disconnect()
    return 0 if finished else EXIT_CODE


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def hydra_main(cfg: DictConfig) -> None:
    sys.exit(run(to_config(cfg)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    overrides = sys.argv[1:]
    with clear_errors():
        if not only_asks_hydra(overrides):
            load(overrides)
    hydra_main()


if __name__ == "__main__":
    main()
