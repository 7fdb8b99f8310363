"""Detects from the losses that a run diverges, and suggests settings that prevent it."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from pretrain.config.schema import Config

LOGGED = 20  # number of logged losses that must rise
GUESSING = 10  # number of logged losses that must be worse than guessing
ABOVE = 0.05  # nats by which a loss must exceed another loss
RISE = 0.2  # nats by which the loss must rise over the LOGGED losses
ERRORS = 8.0  # number of standard errors that the slope of a rising loss must exceed


class Divergence:
    """Judges the logged losses of a run. ``found`` is the first warning of the run; None if there was none.

    Args:
        logged: the lines of ``metrics.jsonl`` from before the run was resumed. They are judged too, so a resumed run
            warns at the same step as an uninterrupted run, and does not repeat an earlier warning.
    """

    def __init__(self, config: Config, logged: Iterable[dict[str, Any]] = ()):
        self._config = config
        self._first: float | None = None  # the validation loss before training
        self._losses = deque[float](maxlen=LOGGED)
        self.found: str | None = None
        for line in logged:
            if (loss := line.get("train/loss")) is not None:
                self.train(line["step"], loss)
            if (loss := line.get("val/loss")) is not None:
                self.validation(line["step"], loss)

    def train(self, step: int, loss: float) -> str | None:
        """Judge the loss of a logged step, in nats per target; returns the first warning of the run, otherwise None."""
        self._losses.append(loss)
        guessing = math.log(self._config.model.vocab_size)
        losses = list(self._losses)
        if len(losses) >= GUESSING and min(losses[-GUESSING:]) > guessing + ABOVE:
            return self._warn(
                f"at step {step} the last {GUESSING} logged losses are above {guessing:.2f}, the loss of guessing "
                "(ln of model.vocab_size)"
            )
        if len(losses) == LOGGED and rises(losses):
            return self._warn(f"the loss has risen for {LOGGED} logged steps, to {loss:.3f} at step {step}")
        return None

    def validation(self, step: int, loss: float) -> str | None:
        """Judge the loss of a validation after ``step`` steps; returns the first warning of the run, otherwise None."""
        if self._first is None:
            self._first = loss if step == 0 else None
        if self._first is None or loss <= self._first + ABOVE:
            return None
        return self._warn(f"the validation loss {loss:.3f} at step {step} is above the first, {self._first:.3f}")

    def _warn(self, sign: str) -> str | None:
        if self.found:
            return None
        optim = self._config.optim
        fixes = ["lower optim.linear_lr and optim.lr"]
        fixes += ["limit the gradients with optim.clip=1"] if not optim.clip else []
        fixes += ["warm up with optim.warmup_steps=0.1"] if not optim.warmup_steps else []
        self.found = f"the run diverges: {sign}; {', '.join(fixes)}"
        return self.found


def rises(losses: list[float]) -> bool:
    """Whether the least-squares line through ``losses`` rises by more than 0.2 nats, and more than scatter explains.

    The latter means: its slope is more than 8 times its standard error sqrt(Σ residual² / (n − 2) / Σ (x − x̄)²).
    """
    n, mean, middle = len(losses), fmean(losses), (len(losses) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (loss - mean) for i, loss in enumerate(losses)) / spread
    residuals = sum((loss - mean - slope * (i - middle)) ** 2 for i, loss in enumerate(losses))
    error = math.sqrt(residuals / (n - 2) / spread)
    return slope * (n - 1) > RISE and slope > ERRORS * error
