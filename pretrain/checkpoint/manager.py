"""The checkpoints of one run: when to save, which checkpoint to resume from, and rolling back after a spike."""

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from data.atomic import write_atomic
from optim.stack import OptimizerStack
from pretrain.checkpoint.directory import Damaged, newest_good, read_state, set_aside
from pretrain.checkpoint.retention import tidy
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.tensors import load
from pretrain.config.schema import ConfigError, TrainConfig
from pretrain.distributed.world import World

logger = logging.getLogger(__name__)


class CheckpointManager(Saver):
    """The ``Saver`` of a run, which also resumes from checkpoints. Construct it on every process.

    ``resume_from`` is the newest intact checkpoint, found by the main process; None for a new run. ``rollbacks`` are
    the steps (from 1) whose batches are skipped because of a loss spike.

    Args:
        folder: the folder of the checkpoints.
        rollbacks_file: the file with ``rollbacks``, which need not exist.

    Raises:
        ValueError: on every process: the checkpoints cannot be used, see ``newest_good``, or ``rollbacks_file`` cannot
            be read.
    """

    def __init__(self, folder: Path, rollbacks_file: Path, train: TrainConfig, world: World):
        self.train, self._rollbacks_file = train, rollbacks_file
        self._damaged: list[Damaged]
        self.rollbacks: list[int]
        self.resume_from: Path | None
        self.rollbacks, self.resume_from, self._damaged = world.on_main(
            lambda: (read_rollbacks(rollbacks_file), *newest_good(folder))
        )
        super().__init__(
            folder, world, background=train.async_save and train.checkpoint_every != 1,
            keep_last=train.keep_last, keep_every=train.keep_every, timeout=timedelta(minutes=train.timeout_minutes),
        )  # fmt: skip

    def state(self) -> dict[str, Any] | None:
        """The content of ``state.json`` in the checkpoint ``resume_from``; None for a new run."""
        return read_state(self.resume_from) if self.resume_from else None

    def load(self, model: nn.Module, optim: OptimizerStack) -> None:
        """Fill ``model`` and ``optim`` with the tensors of the checkpoint ``resume_from``, which must not be None.

        Raises:
            ValueError: see ``pretrain.checkpoint.tensors.load``.
        """
        assert self.resume_from is not None
        load(self.resume_from, model, optim)

    def open(self) -> None:
        """Prepare the folder for this run; call on the main process only. Nothing on disk changes before this call.

        Renames damaged checkpoints, and deletes checkpoints according to ``keep_last`` and ``keep_every``.
        """
        for error in self._damaged:
            logger.warning(
                "%s is damaged (%s) and is not used; renamed it to %s", error.path, error.what, set_aside(error).name
            )
        if self.resume_from:
            # The process that saved this checkpoint may have been killed before it did this.
            tidy(self.resume_from, *self.keep)

    def due(self, step: int) -> bool:
        """Whether ``train.checkpoint_every`` requires a checkpoint of ``step``. False for the last step of a run.

        The checkpoint of the last step is always saved.
        """
        every = self.train.checkpoint_every
        return every > 0 and step % every == 0 and step < self.train.steps

    def roll_back(self, step: int) -> None:
        """Record that the batch of ``step`` (from 1) is to be skipped after the rollback; call on every process.

        Waits for a running save first, because the run continues from the newest checkpoint.
        """
        self.wait()
        if self.world.is_main:
            write_atomic(self._rollbacks_file, json.dumps({"steps": [*self.rollbacks, step]}))
        self.world.barrier()


def read_rollbacks(file: Path) -> list[int]:
    """The steps in ``rollbacks.json``, whose batches are skipped; [] without the file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not file.exists():
        return []
    try:
        steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
        if all(isinstance(step, int) for step in steps):
            return steps
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ConfigError(f"{file} does not list the steps to skip; restore it from a backup")
