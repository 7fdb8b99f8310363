"""Steps in float32 on parameters that are kept in bfloat16, with any stock optimizer.

A stock optimizer changes a bfloat16 parameter in place, where an update below half its spacing is lost, and a second
moment stops following its gradient. So for the length of a step the optimizer is lent float32 stand-ins: of the
parameter, its gradient and its state. Between steps only bfloat16 is kept, and the caller rounds to it.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Round = Callable[[nn.Parameter, str, Tensor], Tensor]


def lend(optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Put float32 stand-ins of ``parameters`` in their places in ``optimizer``, and return them by parameter."""
    stand_ins = {}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p not in parameters:
                continue
            stand_in = nn.Parameter(p.detach().float())
            stand_in.grad = None if p.grad is None else p.grad.float()
            stand_ins[p] = group["params"][i] = stand_in
            if state := optimizer.state.pop(p, None):
                optimizer.state[stand_in] = {k: t.float() if _is_elementwise(t, p) else t for k, t in state.items()}
    return stand_ins


def take_back(
    optimizer: torch.optim.Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter], round_state: Round
) -> None:
    """Undo ``lend`` after a step: what belongs to the elements of a parameter is kept as ``round_state`` returns it.

    State of other shapes (counts, factors, quantised blocks) stays as the optimizer made it. The parameter itself is
    left as it was: its new value is that of the stand-in.
    """
    parameters = {stand_in: p for p, stand_in in stand_ins.items()}
    for group in optimizer.param_groups:
        group["params"] = [parameters.get(p, p) for p in group["params"]]
    for p, stand_in in stand_ins.items():
        if state := optimizer.state.pop(stand_in, None):
            optimizer.state[p] = {k: round_state(p, k, t) if _is_elementwise(t, p) else t for k, t in state.items()}


def _is_elementwise(state: Any, parameter: Tensor) -> bool:
    return (
        torch.is_tensor(state)
        and (isinstance(state, DTensor) or not is_traceable_wrapper_subclass(state))
        and state.shape == parameter.shape
        and state.is_floating_point()
    )
