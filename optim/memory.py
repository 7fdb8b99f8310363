"""The memory of weights, gradients and optimizer state during training, by formula.

Activations need additional memory; pretrain.planner simulates a step for them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.dtensor import local
from optim.normuon import NorMuon
from optim.stack import OptimizerStack


def held_bytes(model: nn.Module, stack: OptimizerStack) -> dict[str, int | None]:
    """Bytes on this process, known before the first step, for three components:

    weights          parameters and buffers of ``model``, and float32 master weights
    gradients        of all trained parameters; 0 if the backward makes the steps and frees each gradient
    optimizer state  without step counters; None for an optimizer without a formula here: optimizers that quantise or
                     project their state, and most optimizers given by a dotted path
    """
    masters = [master for _, master in stack.masters.pairs] if stack.masters else []
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": _bytes([*model.parameters(), *model.buffers(), *masters]),
        "gradients": 0 if stack.steps_in_backward else _bytes(trained),
        "optimizer state": _state_bytes(stack.optimizer),
    }


def _state_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    parts = getattr(optimizer, "parts", [optimizer])
    sizes = [_state_of(part, group) for part in parts for group in part.param_groups]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _state_of(optimizer: torch.optim.Optimizer, group: dict) -> int | None:
    """Bytes of the state that ``optimizer`` keeps for ``group``."""
    parameters = [local(p) for p in group["params"]]
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return 2 * _bytes(parameters)
    if isinstance(optimizer, NorMuon):  # momentum, and a number for each row in float32 at least
        return _bytes(parameters) + sum(len(p) * max(p.element_size(), 4) for p in parameters)
    if isinstance(optimizer, torch.optim.Muon):
        return _bytes(parameters)
    if type(optimizer) is torch.optim.SGD:
        return _bytes(parameters) if group["momentum"] else 0
    if isinstance(optimizer, torch.optim.Adafactor):  # the means of each row and column, of vectors all elements
        return sum((p.numel() if p.ndim < 2 else sum(p.shape)) * p.element_size() for p in parameters)
    return None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in map(local, tensors))
