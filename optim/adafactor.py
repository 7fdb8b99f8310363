"""Adafactor as an inner optimizer: like torch's, but without waiting for the GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.precision import at_least_fp32

CHUNK = 2**24  # elements of a parameter that are scaled in float32 at a time


class Adafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor (Shazeer & Stern, arXiv 1804.04235), with the same state and the same step.

    For every parameter, torch copies two norms from the device to Python numbers. Here they stay on the GPU as float32
    scalars. On a CPU, where copies do not wait, the step is bit-identical to torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, norms_on_host=p.device.type == "cpu")
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], norms_on_host: bool) -> None:
        """The step on one parameter.

        Args:
            norms_on_host: compute with the norms as Python numbers, like torch; otherwise they stay on the device.
        """
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
        gradient = -gradient if group["maximize"] else gradient
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0), **_new_variance(gradient)}
        state["step"] += 1
        step, size = state["step"].item(), parameter.numel() ** 0.5  # torch keeps the count on the host
        lr = float(group["lr"])
        own_size = parameter.norm(2)
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        update = _variance(state, gradient, step ** group["beta2_decay"], eps1).clamp_(min=eps1**2).rsqrt_()
        update.mul_(gradient)
        change_size, rate = update.norm(2), min(lr, 1 / step**0.5)
        if norms_on_host:
            alpha = max(eps2, own_size.item() / size) * rate
            parameter.add_(update, alpha=-alpha / max(1.0, change_size.item() / (size * group["d"])))
            return
        wide = at_least_fp32(parameter.dtype)
        alpha = (own_size.to(wide) / size).clamp(min=eps2) * rate
        factor = -alpha / (change_size.to(wide) / (size * group["d"])).clamp(min=1.0)
        parameter, update = torch.atleast_1d(parameter, update)
        rows = max(1, CHUNK // max(1, parameter[:1].numel()))
        for part, change in zip(parameter.split(rows), update.split(rows), strict=True):
            part.add_(change.to(wide).mul_(factor))  # the parameter's dtype would round the factor


def _new_variance(gradient: Tensor) -> dict[str, Tensor]:
    """Zeros under torch's names: the variance of a vector, or of a matrix its means along the last two dimensions."""
    if gradient.ndim < 2:
        return {"variance": torch.zeros_like(gradient)}
    *others, rows, columns = gradient.shape
    return {"row_var": gradient.new_zeros((*others, rows, 1)), "col_var": gradient.new_zeros((*others, 1, columns))}


def _variance(state: dict[str, Tensor], gradient: Tensor, weight: float, eps1: float) -> Tensor:
    """Update the averages of squared gradients with ``weight``; returns the variance of each gradient element."""
    if gradient.ndim < 2:
        return state["variance"].lerp_(gradient * gradient, weight).clone()
    row_var, col_var = state["row_var"], state["col_var"]
    row_var.lerp_(gradient.norm(dim=-1, keepdim=True).square_().div_(gradient.shape[-1]), weight)
    col_var.lerp_(gradient.norm(dim=-2, keepdim=True).square_().div_(gradient.shape[-2]), weight)
    return (row_var @ col_var).div_(row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1))
