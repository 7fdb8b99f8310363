"""A step of an optimizer on some of its parameters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def only(optimizer: torch.optim.Optimizer, parameters: Collection[Tensor]) -> Iterator[None]:
    """Inside, ``optimizer`` knows of ``parameters`` alone; its groups and their other settings stay."""
    held = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in parameters]
    try:
        yield
    finally:
        for group, all_of_it in zip(optimizer.param_groups, held, strict=True):
            group["params"] = all_of_it


class Parts(torch.optim.Optimizer):
    """Steps by each of ``parts`` in turn; groups and state are theirs, shared and not copied."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts: list[torch.optim.Optimizer] = []
        for part in parts:
            self.parts += part.parts if isinstance(part, Parts) else [part]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
