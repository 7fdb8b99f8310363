"""The rows that a run begins with: chosen by the gradient of its first batch, before that is trained on."""

import logging
import time
from collections.abc import Sequence

import torch

from models.activation_checkpointing import all_checkpointed
from optim.grass import Grass
from pretrain.training.train_step import MicroBatch, TrainStep

logger = logging.getLogger(__name__)
SECONDS = 10  # between two lines about how far the pass has come


def choose_first_rows(grass: Grass, update: TrainStep, micro_batches: Sequence[MicroBatch], count: int | None) -> None:
    """Probe all layers in one pass over ``micro_batches``, and let ``grass`` choose.

    Compiled blocks run as they are written: no graph is compiled for a single pass. Every block keeps only its input,
    so that this pass, in which layers that select columns keep whole inputs, needs no more memory than a step.

    Args:
        count: of the batch's targets on all processes, when not every token is one.
    """
    logger.info("choosing the first rows in one pass over %d micro-batches …", len(micro_batches))
    hook = update.model.register_forward_hook(_Progress(len(micro_batches)))
    blocks = update.model.layers  # type: ignore[union-attr]
    try:
        with torch.compiler.set_stance("force_eager"), all_checkpointed(blocks):  # type: ignore[arg-type]
            grass.start(lambda: update.accumulate(micro_batches, count))
    finally:
        hook.remove()


class _Progress:
    """A forward hook that logs, from time to time, how many of ``total`` micro-batches have been seen."""

    def __init__(self, total: int):
        self.total, self.seen, self.logged = total, 0, time.monotonic()

    def __call__(self, *_) -> None:
        self.seen += 1
        if time.monotonic() > self.logged + SECONDS:
            logger.info("… micro-batch %d of %d", self.seen, self.total)
            self.logged = time.monotonic()
