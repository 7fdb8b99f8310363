"""What goes wrong with single steps: losses and gradients that are not finite, and losses that jump.

Batches that no update was made from, or that ended the run, are told in ``bad_batches.jsonl`` with their documents.
"""

import math
from collections import deque
from statistics import median
from typing import Any

SPIKE_WINDOW = 32  # losses that a step's loss is held against
SPIKE_AFTER = 8  # with fewer there is no spike
MOST_SKIPPED_IN_A_ROW = 10  # then it is not the batches: the weights themselves make no finite loss
NAMED = 5  # documents in a message; the file has all


class RolledBack(Exception):
    """The run goes on from its newest checkpoint, and passes over the batch that its loss jumped at."""


class SpikeWatch:
    """The latest losses, part of a checkpoint, so that a run that goes on sees the same spikes.

    Args:
        factor: a loss above so many times their median is a spike; 0: none is.
    """

    def __init__(self, factor: float):
        self.factor, self.losses = factor, deque[float](maxlen=SPIKE_WINDOW)

    def sees_spike(self, loss: float) -> bool:
        """Whether ``loss`` is one; if it is not, it is one of the latest losses from now on."""
        if len(self.losses) >= SPIKE_AFTER and loss > self.factor * median(self.losses):
            return True
        if math.isfinite(loss):
            self.losses.append(loss)
        return False


def bad_batch(step: int, what: str, documents: list[str], **numbers: float) -> dict[str, Any]:
    """A line of ``bad_batches.jsonl``; numbers that JSON has no word for are strings."""
    told = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
    return {"step": step, "what": what, **told, "documents": documents}


def in_short(documents: list[str]) -> str:
    more = len(documents) - NAMED
    return ", ".join(documents[:NAMED]) + (f" and {more} more" if more > 0 else "")
