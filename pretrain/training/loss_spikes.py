"""Recognise a loss that jumps."""

from collections import deque
from statistics import median

WINDOW = 32  # number of earlier losses that a loss is compared with
NEEDED = 8  # with fewer earlier losses nothing is a spike


class LossSpikes:
    """The latest losses of a run, in nats per target. Checkpoints hold them: a resumed run finds the same spikes.

    Args:
        factor: a loss above ``factor`` times the median of the latest ``WINDOW`` losses is a spike.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.losses = deque[float](maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` is a spike, compared with the losses added so far."""
        return len(self.losses) >= NEEDED and loss > self.factor * median(self.losses)

    def add(self, loss: float) -> None:
        """Add a loss, a spike too: a loss that stays high soon stops being one."""
        self.losses.append(loss)
