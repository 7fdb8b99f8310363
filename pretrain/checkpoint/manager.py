"""The checkpoints of one run: when to save, which one to resume from, and going back to one after a spike."""

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.atomic import write_atomic
from optim.stack import OptimizerStack
from pretrain.checkpoint.directory import (
    Damaged,
    latest,
    newest_good,
    path_of,
    point_at,
    read_state,
    set_aside,
)
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.tensors import load
from pretrain.config.schema import ConfigError, TrainConfig
from pretrain.distributed.world import World

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Construct it on every process: the main process looks for the newest intact checkpoint, and tells the others.

    ``resume_from`` is that checkpoint, None for a new run. ``rollbacks`` are the steps whose batches are left out
    because the loss jumped there.

    Args:
        folder: of the checkpoints.
        rollbacks_file: lists ``rollbacks``; need not exist.

    Raises:
        ValueError: on every process: no checkpoint is intact, or ``rollbacks_file`` cannot be read.
    """

    def __init__(self, folder: Path, rollbacks_file: Path, train: TrainConfig, world: World):
        self.folder, self.train, self.world = folder, train, world
        self._rollbacks_file = rollbacks_file
        self._damaged: list[Damaged]
        self.rollbacks: list[int]
        self.resume_from: Path | None
        self.rollbacks, self.resume_from, self._damaged = world.on_main(
            lambda: (read_rollbacks(rollbacks_file), *newest_good(folder))
        )
        self._saver = Saver(
            folder, world, background=train.async_save and train.checkpoint_every != 1,
            keep_last=train.keep_last, keep_every=train.keep_every, timeout=timedelta(minutes=train.timeout_minutes),
        )  # fmt: skip

    def state(self) -> dict[str, Any] | None:
        """``state.json`` of the checkpoint to resume from; None for a new run."""
        return read_state(self.resume_from) if self.resume_from else None

    def load(self, model: nn.Module, optim: OptimizerStack) -> None:
        """Fill ``model`` and ``optim`` with the tensors of the checkpoint to resume from."""
        assert self.resume_from is not None
        load(self.resume_from, model, optim)

    def open(self) -> None:
        """Prepare the folder for a run that resumes from ``resume_from``; call on the main process only.

        Damaged checkpoints are renamed, and checkpoints that ``keep_last`` and ``keep_every`` do not keep are deleted.
        Nothing on disk changes before this.
        """
        for error in self._damaged:
            logger.warning("%s is damaged (%s); it is now %s", error.path, error.what, set_aside(error).name)
        if self.resume_from:
            point_at(self.resume_from)  # its process may have been killed before it could
            prune(self.folder, self.train.keep_last, self.train.keep_every)

    def due(self, step: int) -> bool:
        """Whether ``train.checkpoint_every`` asks for a checkpoint of ``step``; the end of a run is no such step."""
        every = self.train.checkpoint_every
        return every > 0 and step % every == 0 and step < self.train.steps

    def has(self, step: int) -> bool:
        """Whether ``step`` is saved already."""
        return path_of(self.folder, step).exists()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Wait for the running save, then save ``step`` unless it is saved; see ``Saver.save``."""
        self._saver.save(step, tensors, state)

    def poll(self) -> None:
        """Report how a save that has ended went; call after each step."""
        self._saver.poll()

    def wait(self) -> Path | None:
        """Wait for the running save, and report how it went; returns the newest checkpoint."""
        self._saver.wait()
        return latest(self.folder)

    def finish(self) -> None:
        """Wait for the latest save.

        Raises:
            NotSaved: it is not on disk.
        """
        self._saver.finish()

    def roll_back(self, step: int) -> None:
        """Have the next life of the run leave out the batch of ``step``; call on every process.

        It resumes from the newest checkpoint, for which this waits.
        """
        self._saver.wait()
        if self.world.is_main:
            write_atomic(self._rollbacks_file, json.dumps({"steps": [*self.rollbacks, step]}))
        self.world.barrier()


def read_rollbacks(file: Path) -> list[int]:
    """The steps in ``rollbacks.json``, whose batches are left out; [] without the file.

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
    raise ConfigError(f"{file} does not list steps to leave out; bring it back from a copy")
