"""Notifications from inside a training step, for code that times or measures its parts."""

from collections.abc import Sequence


class StepObserver:
    """Is called at events of a training step, on every process: override the methods of the events that you need.

    The order in one update: ``before_forward`` to ``before_backward`` for each micro-batch; ``after_backward`` when the
    gradients of all micro-batches are complete; the optimizer; the refresh. The optimizer may step several times in an
    update: once for each block with rows in low precision, and with ``train.step_in_backward`` once for each parameter,
    inside the last backward. With ``train.step_in_backward``, the refresh also precedes ``after_backward``.
    """

    def before_forward(self) -> None:
        """Before the forward of a micro-batch."""

    def after_forward(self) -> None:
        """After the forward of a micro-batch."""

    def before_backward(self) -> None:
        """Before the backward of a micro-batch."""

    def after_backward(self) -> None:
        """After all micro-batches, when gradients are complete and averaged over the processes."""

    def before_optimizer(self) -> None:
        """Before a step of the optimizer, after Grass has prepared it."""

    def after_optimizer(self) -> None:
        """After a step of the optimizer, when Grass has copied the updated rows into the weights."""

    def before_refresh(self) -> None:
        """After every update, made or skipped, before Grass gathers scores and chooses rows, if any are due."""

    def after_refresh(self) -> None:
        """After every update, when Grass has chosen rows, if any are due, and prepared to score the next update."""


def notify(observers: Sequence[StepObserver], event: str) -> None:
    """Call the method ``event`` of every observer."""
    for observer in observers:
        getattr(observer, event)()
