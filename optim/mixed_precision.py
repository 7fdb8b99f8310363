"""Steps in float32 on parameters that are kept in bfloat16, with any stock optimizer.

A stock optimizer changes a bfloat16 parameter in place, where an update below half its spacing is lost, and a second
moment stops following its gradient. So for the length of a step the optimizer is lent float32 stand-ins: of the
parameter, its gradient and its state. Between steps only bfloat16 is kept, and the caller rounds to it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.dtensor import local

# What belongs to the elements of some parameters, by name, as it is to be kept.
Round = Callable[[Sequence[nn.Parameter], str, Sequence[Tensor]], Sequence[Tensor]]


@torch.no_grad()
def lend(optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Put float32 stand-ins of ``parameters`` in their places in ``optimizer``, and return them by parameter."""
    if not parameters:
        return {}
    lent = [p for group in optimizer.param_groups for p in group["params"] if p in parameters]
    stand_ins = {p: nn.Parameter(wide) for p, wide in zip(lent, _widened(lent), strict=True)}
    with_gradient = [p for p in lent if p.grad is not None]
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    for p, gradient in zip(with_gradient, _widened(gradients), strict=True):
        stand_ins[p].grad = gradient
    for group in optimizer.param_groups:
        group["params"] = [stand_ins.get(p, p) for p in group["params"]]
    for p in lent:
        if state := optimizer.state.pop(p, None):
            optimizer.state[stand_ins[p]] = state
    for name, holders in _elementwise(optimizer, stand_ins).items():
        states = [optimizer.state[stand_ins[p]] for p in holders]
        for state, wide in zip(states, _widened([state[name] for state in states]), strict=True):
            state[name] = wide
    return stand_ins


def take_back(
    optimizer: torch.optim.Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter], round_state: Round
) -> None:
    """Undo ``lend`` after a step: what belongs to the elements of a parameter is kept as ``round_state`` returns it.

    State of other shapes (counts, factors, quantised blocks) stays as the optimizer made it. The parameter itself is
    left as it was: its new value is that of the stand-in.
    """
    parameters = {stand_in: p for p, stand_in in stand_ins.items()}
    if not parameters:
        return
    for group in optimizer.param_groups:
        group["params"] = [parameters.get(p, p) for p in group["params"]]
    for name, holders in _elementwise(optimizer, stand_ins).items():
        states = [optimizer.state[stand_ins[p]] for p in holders]
        for state, kept in zip(states, round_state(holders, name, [state[name] for state in states]), strict=True):
            state[name] = kept
    for p, stand_in in stand_ins.items():
        if state := optimizer.state.pop(stand_in, None):
            optimizer.state[p] = state


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float32, made in one go."""
    wide = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    if wide:
        torch._foreach_copy_([local(w) for w in wide], [local(t.detach()) for t in tensors])
    return wide


def _elementwise(
    optimizer: torch.optim.Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter]
) -> dict[str, list[nn.Parameter]]:
    """By name of a state that belongs to single elements: the parameters that have one."""
    found: dict[str, list[nn.Parameter]] = {}
    for p, stand_in in stand_ins.items():
        for name, value in optimizer.state.get(stand_in, {}).items():
            if _is_elementwise(value, p):
                found.setdefault(name, []).append(p)
    return found


def _is_elementwise(state: Any, parameter: Tensor) -> bool:
    return (
        torch.is_tensor(state)
        and (isinstance(state, DTensor) or not is_traceable_wrapper_subclass(state))
        and state.shape == parameter.shape
        and state.is_floating_point()
    )


class MasterWeights:
    """fp32 copies of the bf16 or fp16 parameters of an optimizer, attached by step hooks.

    Takes the place of each low-precision parameter in ``optimizer.param_groups``. Before a step the gradients move to
    the masters; after it the parameters take the masters' values, rounded to nearest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._master_of(p) for p in group["params"]]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        master = nn.Parameter(parameter.detach().float())
        self.pairs.append((parameter, master))
        return master

    def holds(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one of the masters."""
        return any(master is parameter for _, master in self.pairs)

    def _before_step(self, *_) -> None:
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def _after_step(self, *_) -> None:
        for parameter, master in self.pairs:
            parameter.copy_(master)
            master.grad = None
