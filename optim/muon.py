"""Muon as an inner optimizer: for the linears, with AdamW for everything else."""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.sharded import local, sum_parts
from optim.parts import Parts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon and of Jordan's
TOGETHER = 4  # matrices that are orthogonalised at once: a quarter of the kernels, and few temporaries in any model


class Muon(torch.optim.Muon):
    """torch.optim.Muon, with the Newton-Schulz iteration batched and in a precision that suits the device.

    Its own iteration takes one matrix at a time, always in bfloat16: hundreds of small kernels on a GPU, some twenty
    times slower than float32 on a CPU without bfloat16 units, and as unlike from one way of sharding to another as
    bfloat16 rounds. Here matrices of one shape go together, in bfloat16 on a GPU and otherwise in their own precision
    (float32 at least). Matrices sharded along their longer side stay so: only the small square products are sent.

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
        for p, direction in zip(parameters, _orthogonal(directions), strict=True):
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.to(p.dtype), alpha=-rate)


def orthogonalize(
    matrices: Tensor, steps: int = 5, *, tall: bool | None = None, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``matrices`` (b, m, n) with their singular values brought near 1, by Newton-Schulz iterations (Jordan's).

    An iteration multiplies X by a polynomial of X Xᵀ; all together are one polynomial of the first X Xᵀ. In float32 or
    wider they are made on that small square alone, and X is multiplied once: fewer products where X is twice as long as
    wide, and a single sum over parts. bfloat16 is too coarse for that, so a GPU iterates on X itself.

    They may be parts of matrices that are divided along their longer side, which ``tall`` says is the first; ``total``
    then adds up sums over the parts.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32))
    tall = matrices.shape[-2] > matrices.shape[-1] if tall is None else tall
    wide = wide.mT if tall else wide
    divided, total = total is not None, total or (lambda sums: sums)
    squares = total(wide.norm(dim=(-2, -1), keepdim=True).square())
    wide = wide / squares.sqrt().clamp(min=1e-7)
    rows, columns = wide.shape[-2:]
    if wide.dtype == torch.bfloat16 or isinstance(wide, DTensor) or not (divided or columns >= 2 * rows):
        for _ in range(steps):
            gram = total(wide @ wide.mT)
            wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    else:
        gram, factors = total(wide @ wide.mT), list[Tensor]()
        for _ in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            factors.append(factor)
            gram = factor @ gram @ factor
        wide = reduce(torch.matmul, factors) @ wide  # all of them commute
    return wide.mT if tall else wide


def _orthogonal(directions: list[Tensor]) -> tuple[Tensor, ...]:
    """The part of each orthogonalised direction, all of one shape, that this process holds."""
    first = directions[0]
    tall = first.shape[0] > first.shape[1]
    if not isinstance(first, DTensor):
        return orthogonalize(torch.stack(directions)).unbind()
    longer = int(not tall)
    if all(p.is_replicate() or p.is_shard(longer) for d in directions for p in cast(DTensor, d).placements):
        parts = torch.stack([local(d) for d in directions])
        return orthogonalize(parts, tall=tall, total=lambda sums: sum_parts(sums, first)).unbind()
    stacked = torch.stack(directions)  # in what is sharded otherwise, torch decides what to send
    whole = cast(DTensor, orthogonalize(stacked))
    return local(whole.redistribute(placements=cast(DTensor, stacked).placements)).unbind()


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
