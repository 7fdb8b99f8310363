"""Recognise loss spikes."""

from collections import deque
from statistics import median

WINDOW = 32  # number of earlier losses with which a loss is compared
NEEDED = 8  # minimum number of earlier losses; with fewer, nothing is a spike


class LossSpikes:
    """The latest losses of a run, in nats per target. Checkpoints contain them, so a resumed run finds the same spikes.

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
        """Add a loss, also after a spike, so that a permanently higher loss is soon not a spike any more."""
        self.losses.append(loss)
