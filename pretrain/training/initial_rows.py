"""The initial rows of a run, chosen by the gradient of its first batch, before training on that batch."""

import logging
import time
from collections.abc import Sequence

import torch

from data.wording import counted
from models.activation_checkpointing import all_checkpointed
from optim.grass import Grass
from pretrain.training.train_step import MicroBatch, TrainStep

logger = logging.getLogger(__name__)
LOG_SECONDS = 10  # between two lines on the progress of the pass


def choose_initial_rows(
    grass: Grass, update: TrainStep, micro_batches: Sequence[MicroBatch], targets: int | None
) -> None:
    """Let ``grass`` choose the initial rows by the gradients of one forward and backward over ``micro_batches``.

    A selection that needs no gradients skips this pass. In the pass, compiled blocks run eagerly, because compiling for
    a single pass takes longer. All blocks use activation checkpointing, so the pass needs no more memory than a
    training step, although layers that select columns keep their complete inputs.

    Args:
        update: runs the forward and backward.
        targets: number of targets of the batch on all processes; None if every token is a target.
    """
    if not grass.scored:
        grass.start(lambda: None)
        return
    logger.info("choosing the initial rows in one pass over %s …", counted(len(micro_batches), "micro-batch", "es"))
    hook = update.model.register_forward_hook(_Progress(len(micro_batches)))
    blocks = update.model.layers  # type: ignore[union-attr]
    try:
        with torch.compiler.set_stance("force_eager"), all_checkpointed(blocks):  # type: ignore[arg-type]
            grass.start(lambda: update.accumulate(micro_batches, targets))
    finally:
        hook.remove()


class _Progress:
    """A forward hook that logs the number of micro-batches done, out of ``total``, every ten seconds."""

    def __init__(self, total: int):
        self.total, self.seen, self.logged = total, 0, time.monotonic()

    def __call__(self, *_) -> None:
        self.seen += 1
        if time.monotonic() > self.logged + LOG_SECONDS:
            logger.info("… micro-batch %d of %d", self.seen, self.total)
            self.logged = time.monotonic()
