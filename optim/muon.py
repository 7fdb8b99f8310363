"""Muon as an inner optimizer: for the linears, with AdamW for everything else."""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from models.dtensor import local, sum_parts
from models.together import stack_size
from optim.composite import Parts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon and of Jordan's


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
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [local(cast(Tensor, p.grad)) for p in parameters]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
        orthogonal = _orthogonal(list(directions), like=parameters[0])
        here = [local(p) for p in parameters]
        torch._foreach_mul_(here, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_add_(here, list(orthogonal.to(here[0].dtype).unbind()), alpha=-rate)


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


def _orthogonal(directions: list[Tensor], like: Tensor) -> Tensor:
    """The orthogonalised directions, all of one shape, stacked: the parts of them that this process holds.

    ``directions`` are the parts that are here of tensors that are sharded as ``like`` is.
    """
    tall = like.shape[0] > like.shape[1]
    stacked = torch.stack(directions)
    if not isinstance(like, DTensor):
        return orthogonalize(stacked)
    longer = int(not tall)
    if all(p.is_replicate() or p.is_shard(longer) for p in like.placements):
        return orthogonalize(stacked, tall=tall, total=lambda sums: sum_parts(sums, like))
    # In what is sharded otherwise, torch decides what to send.
    placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]
    size = torch.Size((len(directions), *like.shape))
    sharded = DTensor.from_local(
        stacked,
        like.device_mesh,
        placements,
        run_check=False,
        shape=size,
        stride=torch.empty(size, device="meta").stride(),
    )
    whole = cast(DTensor, orthogonalize(sharded))
    return local(whole.redistribute(placements=placements))


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``parameters`` that are alike in shape, dtype and placement, as many as are stacked at once."""
    alike: dict[Any, list[Tensor]] = {}
    for p in parameters:
        alike.setdefault((p.shape, p.dtype, p.placements if isinstance(p, DTensor) else None), []).append(p)
    for together in alike.values():
        first = together[0]
        # Not of the part that is here: processes whose parts differ in size must make the same batches.
        parts = first.device_mesh.size() if isinstance(first, DTensor) else 1
        size = stack_size(len(together), first.numel() // parts, first.device)
        for start in range(0, len(together), size):
            yield together[start : start + size]


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
