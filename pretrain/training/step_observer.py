"""Notifications from inside a training step, for code that times or measures its parts."""

from collections.abc import Sequence


class StepObserver:
    """Override the methods of the events you need. They are called on every process.

    In one step: ``before_forward`` to ``before_backward`` once for each micro-batch; ``after_backward`` when the
    gradients of all micro-batches are complete; then the optimizer and the refresh. In one update, the optimizer may
    step several times: once for each block with rows in low precision, and with ``train.step_in_backward`` once for
    each parameter, inside the last backward. Then the refresh also precedes ``after_backward``.
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
        """After a step of the optimizer, after Grass has folded it into the weights."""

    def before_refresh(self) -> None:
        """After an update, made or skipped, before Grass gathers scores and chooses rows; also if no layer is due."""

    def after_refresh(self) -> None:
        """After Grass has chosen rows and started the probes of the next step."""


def notify(observers: Sequence[StepObserver], event: str) -> None:
    """Call the method ``event`` of every observer."""
    for observer in observers:
        getattr(observer, event)()
