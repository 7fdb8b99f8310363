"""Several optimizers as one optimizer, and steps on a subset of an optimizer's parameters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class CompositeOptimizer(torch.optim.Optimizer):
    """Steps with each of ``parts`` in turn.

    It has the groups of all parts, and one state for all parts, which replaces theirs and is empty at first: the parts
    must not have stepped yet. A part that is a CompositeOptimizer is replaced by its parts.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts: list[torch.optim.Optimizer] = []
        for part in parts:
            self.parts += part.parts if isinstance(part, CompositeOptimizer) else [part]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss


@contextmanager
def restricted_to(optimizer: torch.optim.Optimizer, parameters: Collection[Tensor]) -> Iterator[None]:
    """A context in which the groups of ``optimizer`` contain only ``parameters``; group settings stay the same."""
    held = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in parameters]
    try:
        yield
    finally:
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"] = params


def with_gradient(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """The parameters of ``optimizer`` that have a gradient, so that a step would change them."""
    return {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
