"""The optimizer's step on each parameter as soon as its gradient is whole, which is then freed.

So the gradients of a model, and the float32 stand-ins of low-precision rows, never exist all at once (but between the
micro-batches of an update they must). What a step does to a parameter must depend on that parameter alone: clipping by
the global norm cannot be had.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from optim.composite import only
from optim.grass import Grass
from optim.norm_growth import NormGrowthLimiter


class StepInBackward:
    """Makes the steps of ``optimizer`` in the backwards that run inside ``steps()``: the last of each update.

    Args:
        optimizer: what it and its hooks do to a parameter must not depend on the others.
        grass: attached to the optimizer, if any; its refresh waits for the end of the update.
        limiter: scales the gradients before their steps, each by itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, grass: Grass | None, limiter: NormGrowthLimiter | None):
        self.optimizer, self.grass = optimizer, grass
        self.limiters = _one_for_each(limiter) if limiter else {}
        self.norms: list[Tensor] = []
        self.stepping = False
        # Hooks that held this object, which holds the parameters, would keep a model alive that nobody has any more.
        step = weakref.WeakMethod(self._step)

        def hook(parameter: Tensor) -> None:
            if (alive := step()) is not None:
                alive(cast(nn.Parameter, parameter))

        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Inside, a gradient that is whole becomes a step; at the end ``grass`` finishes the update."""
        self.stepping, self.norms = True, []
        if self.grass:
            self.grass.in_update = True
        try:
            yield
        finally:
            self.stepping = False
            if self.grass:
                self.grass.in_update = False
        self.optimizer.step()  # of no gradient that is left; its hooks end the update

    def grad_norm(self) -> Tensor:
        """The norm of all gradients of the latest update, before any limit, on their device."""
        return torch.stack(self.norms).norm()

    def _step(self, parameter: nn.Parameter) -> None:
        if not self.stepping:
            return
        assert parameter.grad is not None
        self.norms.append(parameter.grad.norm().float())
        if parameter in self.limiters:
            self.limiters[parameter]()
        with only(self.optimizer, {parameter}):
            self.optimizer.step()
        parameter.grad = None


def _one_for_each(limiter: NormGrowthLimiter) -> dict[nn.Parameter, NormGrowthLimiter]:
    """Limiters of one parameter each that keep their norms where ``limiter`` does."""
    singles = {p: NormGrowthLimiter([p], limiter.limit) for p in limiter.parameters}
    for i, single in enumerate(singles.values()):
        single.norms = limiter.norms[i : i + 1]
    return singles
