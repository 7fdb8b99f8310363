"""Makes the optimizer's step on each parameter as soon as its gradient is complete, and then frees the gradient.

This saves memory: the float32 copies of all low-precision rows never exist at once. The gradients of all parameters
exist at once only between the micro-batches of an update. The step on a parameter must not depend on other parameters,
so clipping by the global norm is impossible.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from optim.composite import restricted_to
from optim.norm_growth import NormGrowthLimiter


class StepInBackward:
    """Makes the steps of ``optimizer`` in the backwards that run inside ``steps()``: the last backward of each update.

    Args:
        optimizer: its step on a parameter, including hooks, must not depend on other parameters.
        limiter: limits the gradients of its parameters before their steps; None for no limit.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, limiter: NormGrowthLimiter | None):
        self.optimizer = optimizer
        self.limiters = limiter.one_for_each() if limiter else {}
        self.norms: list[Tensor] = []
        self.stepping = False
        # The hooks reference this object weakly. It references the parameters, and would keep an unused model alive.
        step = weakref.WeakMethod(self._step)

        def hook(parameter: Tensor) -> None:
            if (alive := step()) is not None:
                alive(cast(nn.Parameter, parameter))

        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """A context for the last backward of an update: a complete gradient becomes a step on its parameter at once."""
        self.stepping, self.norms = True, []
        try:
            yield
        finally:
            self.stepping = False

    def grad_norm(self) -> Tensor:
        """The norm of all gradients together in the latest update, before any limit: a float32 scalar on the device."""
        return torch.stack(self.norms).norm()

    def _step(self, parameter: nn.Parameter) -> None:
        if not self.stepping:
            return
        assert parameter.grad is not None
        self.norms.append(parameter.grad.norm().float())
        if parameter in self.limiters:
            self.limiters[parameter]()
        with restricted_to(self.optimizer, {parameter}):
            self.optimizer.step()
        parameter.grad = None
