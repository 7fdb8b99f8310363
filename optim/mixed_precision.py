"""Float32 steps on parameters in bfloat16 or float16, with any optimizer.

A stock optimizer changes a bfloat16 parameter in place: updates below half the spacing of bfloat16 are lost, and a
second moment stops following the gradient. Two solutions:

``Float32Steps`` gives the optimizer float32 copies during a step. Between steps, only bfloat16 is kept, and the caller
rounds the results, stochastically in ``optim.grass``. For the rows of Grass.

``MasterWeights`` keeps float32 copies for the complete run. For any low-precision parameter of an optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.dtensor import local
from models.stacking import stack_size
from optim.composite import restricted_to, with_gradient

LOW_PRECISION = (torch.bfloat16, torch.float16)

Round = Callable[[Sequence[nn.Parameter], str, Sequence[Tensor]], Sequence[Tensor]]
"""(parameters, name of a state such as exp_avg, its float32 values for each parameter) → the rounded values to keep."""


class Float32Steps:
    """Replaces low-precision parameters, gradients and state of an optimizer with float32 copies during a step.

    Call ``widen`` before a step and ``restore`` after it.

    Args:
        optimizer: any torch.optim.Optimizer.
        blocks: the low-precision parameters, each with the name of its block: ``step_on_other_blocks`` steps on a few
            blocks at a time, which saves memory.
        round_state: rounds state tensors that have the shape of their parameter. ``restore`` calls it with parameters,
            the name of a state such as exp_avg, and this state of each parameter in float32. It returns rounded states.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, blocks: Mapping[nn.Parameter, str], round_state: Round):
        self.optimizer, self.blocks, self.round_state = optimizer, blocks, round_state
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self._restriction = ExitStack()  # of the running step, to parameters not yet stepped on

    def step_on_other_blocks(self) -> None:
        """Step on all blocks except the last ones, a few at a time, so that only their float32 copies exist at once.

        On a CPU that is one block at a time; a GPU takes several, because each takes some hundred launches. Call it
        before ``optimizer.step()``, which then steps only on the last blocks and the parameters in full precision. The
        optimizer's step on a parameter must not depend on other parameters.
        """
        if not self.blocks:
            return
        remaining, by_block = with_gradient(self.optimizer), dict[str, list[nn.Parameter]]()
        for p, block in self.blocks.items():
            if p in remaining:
                by_block.setdefault(block, []).append(p)
        blocks = [*by_block.values()]
        size = _blocks_at_once(blocks)
        starts = range(0, len(blocks), size)
        *others, _ = [[p for block in blocks[n : n + size] for p in block] for n in starts] or [[]]
        if not others:
            return  # also inside the steps made below
        for parameters in others:
            with restricted_to(self.optimizer, set(parameters)):
                self.optimizer.step()
            remaining.difference_update(parameters)
        self._restriction.enter_context(restricted_to(self.optimizer, remaining))

    @torch.no_grad()
    def widen(self) -> None:
        """Replace the low-precision parameters that have a gradient, their gradients and state by float32 copies."""
        if not self.blocks:
            return
        stepped_on = with_gradient(self.optimizer) & self.blocks.keys()
        low = [p for group in self.optimizer.param_groups for p in group["params"] if p in stepped_on]
        if not low:
            return
        self.copies = {p: nn.Parameter(wide) for p, wide in zip(low, _float32(low), strict=True)}
        for p, gradient in zip(low, _float32([p.grad for p in low if p.grad is not None]), strict=True):
            self.copies[p].grad = gradient
        for group in self.optimizer.param_groups:
            group["params"] = [self.copies.get(p, p) for p in group["params"]]
        for p, copy in self.copies.items():
            if state := self.optimizer.state.pop(p, None):
                self.optimizer.state[copy] = state
        for name, holders in self._elementwise_state().items():
            states = [self.optimizer.state[self.copies[p]] for p in holders]
            for state, wide in zip(states, _float32([state[name] for state in states]), strict=True):
                state[name] = wide

    def restore(self) -> dict[nn.Parameter, nn.Parameter]:
        """Put the parameters back into the optimizer, and round their state.

        State with other shapes than the parameter (counts, factors, quantised blocks) stays unchanged. The parameters
        keep the values from before the step: the caller writes the results into them.

        Returns:
            By parameter, its float32 copy with the result of the step; {} if ``widen`` replaced none.
        """
        copies = self.copies
        if copies:
            parameters = {copy: p for p, copy in copies.items()}
            for group in self.optimizer.param_groups:
                group["params"] = [parameters.get(p, p) for p in group["params"]]
            for name, holders in self._elementwise_state().items():
                states = [self.optimizer.state[copies[p]] for p in holders]
                kept = self.round_state(holders, name, [state[name] for state in states])
                for state, value in zip(states, kept, strict=True):
                    state[name] = value
            for p, copy in copies.items():
                if state := self.optimizer.state.pop(copy, None):
                    self.optimizer.state[p] = state
        self.copies = {}
        self._restriction.close()
        return copies

    def _elementwise_state(self) -> dict[str, list[nn.Parameter]]:
        """For each name of a state with one value per element, the copied parameters that have this state."""
        found: dict[str, list[nn.Parameter]] = {}
        for p, copy in self.copies.items():
            for name, value in self.optimizer.state.get(copy, {}).items():
                if _is_elementwise(value, p):
                    found.setdefault(name, []).append(p)
        return found


def _blocks_at_once(blocks: list[list[nn.Parameter]]) -> int:
    """The number of ``blocks`` to step on at a time: on a GPU, as many as fit into a stack (``models.stacking``)."""
    if not blocks or not blocks[0][0].is_cuda:
        return 1
    largest = max(sum(local(p).numel() for p in block) for block in blocks)
    return stack_size(len(blocks), largest, blocks[0][0].device)


def _float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float32 copies, made in one operation."""
    wide = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    if wide:
        torch._foreach_copy_([local(w) for w in wide], [local(t.detach()) for t in tensors])
    return wide


def _is_elementwise(state: Any, parameter: Tensor) -> bool:
    return (
        torch.is_tensor(state)
        and (isinstance(state, DTensor) or not is_traceable_wrapper_subclass(state))
        and state.shape == parameter.shape
        and state.is_floating_point()
    )


class MasterWeights:
    """float32 copies (master weights) of the low-precision parameters of an optimizer, attached by step hooks.

    They replace the parameters in ``optimizer.param_groups``, so create them before the first step. Before a step, the
    gradients are moved to the masters. After the step, the parameters get the masters' values, rounded to nearest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (parameter, its master)
        for group in optimizer.param_groups:
            group["params"] = [self._master_of(p) for p in group["params"]]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype not in LOW_PRECISION:
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
