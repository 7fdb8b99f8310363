"""One optimizer made of several: each steps on parameter groups of its own, and all keep their state in one place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
