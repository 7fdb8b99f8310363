"""Muon as an inner optimizer: for the linears, with AdamW for everything else."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.parts import Parts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon and of Jordan's
TOGETHER = 4  # matrices that are orthogonalised at once: a quarter of the kernels, and few temporaries in any model


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with the Newton-Schulz iteration batched and in a precision that suits the device.

    Its own iteration takes one matrix at a time, always in bfloat16: hundreds of small kernels on a GPU, some twenty
    times slower than float32 on a CPU without bfloat16 units, and as unlike from one way of sharding to another as
    bfloat16 rounds. Here matrices of one shape go together, in bfloat16 on a GPU and otherwise in their own precision
    (float32 at least). Sharded matrices stay so: only the small square products cross the wire.

    The step is scaled to the size of AdamW's, 0.2 √max(rows, columns) (Liu et al., arXiv 2502.16982), so that rates and
    decay mean what they mean there.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stepping = [p for p in group["params"] if p.grad is not None]
            for parameters in _batches(stepping):
                self._step_together(parameters, group)
        return loss

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step on ``parameters``, all of one shape."""
        directions = []
        for p in parameters:
            gradient, state = cast(Tensor, p.grad), self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            directions.append(gradient.lerp(buffer, group["momentum"]))  # Nesterov's
        rate = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
        stacked = torch.stack(directions)
        steps = orthogonalize(stacked)
        if isinstance(steps, DTensor) and isinstance(stacked, DTensor):
            steps = steps.redistribute(placements=stacked.placements)  # replicas may have divided the matrices
        for p, direction in zip(parameters, steps.unbind(), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.to(p.dtype), alpha=-rate)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """``matrices`` (b, m, n) with their singular values brought near 1, by Newton-Schulz iterations (Jordan's)."""
    a, b, c = COEFFICIENTS
    wide = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32))
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = wide.mT if tall else wide
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide.mT if tall else wide


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``parameters`` of one shape and dtype, TOGETHER at a time."""
    alike: dict[Any, list[Tensor]] = {}
    for p in parameters:
        alike.setdefault((p.shape, p.dtype), []).append(p)
    for together in alike.values():
        for start in range(0, len(together), TOGETHER):
            yield together[start : start + TOGETHER]


class MuonAndAdamW(Parts):
    """Muon for the group named "linears" and AdamW for the others: Muon takes hidden matrices only."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        linears = [group for group in params if group["name"] == "linears"]
        others = [group for group in params if group["name"] != "linears"]
        parts: list[torch.optim.Optimizer] = []
        if linears:
            parts.append(Muon(linears, momentum=momentum, **common))
        if others:
            parts.append(torch.optim.AdamW(others, betas=betas, eps=eps, fused=True, **common))
        for group in linears:
            group["decoupled_weight_decay"] = True  # as AdamW marks its own
        super().__init__(parts)
