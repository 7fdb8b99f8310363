"""All parts of an optimizer step: the optimizer, Grass, master weights and limits on gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.dtensor import zeros_divided_like
from optim.grass import Grass
from optim.mixed_precision import MasterWeights
from optim.norm_growth import NormGrowthLimiter
from optim.param_groups import set_rates
from optim.step_in_backward import StepInBackward


class OptimizerStack:
    """An optimizer together with Grass, master weights and a limit on gradients, each of which may be absent (None).

    Args:
        optimizer: with groups from ``optim.param_groups.parameter_groups``.
        grass: already attached to ``optimizer``.
        masters: float32 master weights, already attached to ``optimizer``.
        limiter: limits the gradients of its parameters before a step.
        step_in_backward: step on each parameter during the last backward of an update, as soon as its gradient is
            complete.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        grass: Grass | None = None,
        masters: MasterWeights | None = None,
        limiter: NormGrowthLimiter | None = None,
        step_in_backward: bool = False,
    ):
        self.optimizer, self.grass, self.masters, self.limiter = optimizer, grass, masters, limiter
        self._in_backward = StepInBackward(optimizer, limiter) if step_in_backward else None

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer steps inside the last backward of an update."""
        return self._in_backward is not None

    def set_rates(self, factor: float) -> None:
        """Set the rate of every group for the coming update: its peak rate times ``factor``.

        With Grass, the rate of the group "linears" is also multiplied by ``Grass.rate_factor()``.
        """
        set_rates(self.optimizer, factor, self.grass.rate_factor() if self.grass else 1.0)

    def rates(self) -> dict[str, float]:
        """The current rate of each group, by the group's name."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """A context for the backward of one micro-batch; ``last`` marks the last micro-batch of an update.

        With ``step_in_backward``, the update is complete when the context of the last micro-batch ends.
        """
        if not (self._in_backward and last):
            yield
            return
        with self.grass.update_in_parts() if self.grass else nullcontext(), self._in_backward.steps():
            yield

    def step(self) -> None:
        """Limit the gradients, step, and drop them. With ``step_in_backward``, the backward has done this already."""
        if self._in_backward:
            return
        if self.limiter:
            self.limiter()
        self.optimizer.step()
        self._drop_gradients()

    def skip(self) -> None:
        """Drop the gradients without an update. Grass still counts one, so that its next refresh is not delayed."""
        self._drop_gradients()
        if self.grass:
            self.grass.skip_update()

    def grad_norm(self) -> Tensor:
        """The norm of all gradients together in the latest update, before any limit: a float32 scalar on the device.

        Only with ``step_in_backward``.
        """
        assert self._in_backward is not None
        return self._in_backward.grad_norm()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, besides the model's. Views, not copies.

        Names are optim.<parameter>.<state>, master.<parameter>, grass.<layer>, history.<layer>.<rows or latest> and
        norm_growth.

        Raises:
            ValueError: the optimizer keeps a state that is not a tensor.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in _named_parameters(self.optimizer):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                for part, tensor in _parts(key, value).items():
                    # safetensors slices need a dimension, which torch's counters lack.
                    tensors[f"optim.{name}.{part}"] = tensor.detach().view(tensor.shape or 1)
            if self.masters is not None and self.masters.holds(parameter):
                tensors[f"master.{name}"] = parameter.detach()
        if self.grass is not None:
            tensors |= self.grass.tensors()
        if self.limiter is not None:
            tensors["norm_growth"] = self.limiter.norms
        return tensors

    def make_room(self, stored: Mapping[str, Any]) -> None:
        """Allocate the state tensors that a checkpoint has and a new optimizer lacks, without filling them.

        Args:
            stored: the checkpoint's tensors by name: metadata with ``size`` and ``properties.dtype``.
        """
        for part in getattr(self.optimizer, "parts", [self.optimizer]):
            _make_room_in(part, stored)
        if self.grass is not None:
            self.grass.make_room(stored)

    def resume(self, steps: int) -> None:
        """Continue after ``steps`` updates, with the tensors loaded from a checkpoint."""
        if self.grass:
            self.grass.resume(steps)

    def _drop_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        for p, _ in self.masters.pairs if self.masters else ():
            p.grad = None


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _parts(key: str, value: Any) -> dict[str, Tensor]:
    """The tensors of a state value, by name: ``key``, or for torchao's quantised states key.codes and so on."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"optim.inner keeps {key} as {type(value).__name__}, but checkpoints contain only tensors; choose another "
            "optim.inner"
        )
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
        return {f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
    return {key: value}


def _make_room_in(optimizer: Any, stored: Mapping[str, Any]) -> None:
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in _named_parameters(optimizer):
        state = optimizer.state[parameter]
        for full in [k for k in stored if k.startswith(f"optim.{name}.")]:
            key, _, part = full.removeprefix(f"optim.{name}.").partition(".")
            if part:
                if key not in state:  # torchao's own function creates all parts
                    state[key] = optimizer._new_buffer(parameter, key == "exp_avg")
                continue
            size, dtype = stored[full].size, stored[full].properties.dtype
            counter = size == (1,) and parameter.shape != (1,)
            device = torch.device("cpu") if counter and not fused else parameter.device
            if size == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=dtype)
            elif len(size) == parameter.ndim and not counter:
                state[key] = zeros_divided_like(parameter, size, dtype)
            else:
                state[key] = torch.empty(() if counter else size, dtype=dtype, device=device)
