"""Muon as an inner optimizer: for the linear layers, with AdamW for all other parameters."""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from models.dtensor import local, sum_parts
from models.stacking import stack_size
from optim.composite import CompositeOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the same as in torch.optim.Muon


class Muon(torch.optim.Muon):
    """torch.optim.Muon with a batched Newton-Schulz iteration, in a precision suitable for the device.

    Torch's iteration takes one matrix at a time, always in bfloat16. This launches hundreds of small kernels on a GPU,
    takes about twenty times as long as float32 on a CPU without bfloat16 units, and makes rounding errors that depend
    on the sharding. Here, matrices of one shape are stacked. The iteration is in bfloat16 on a GPU, elsewhere in the
    dtype of the matrices (at least float32). Matrices sharded along their longer side stay sharded: only small square
    products are sent.

    The step is scaled by 0.2 √max(rows, columns) to the size of AdamW's step (Liu et al., arXiv 2502.16982), so that
    rates and decay have the same meaning as for AdamW. Decay is decoupled. Of torch's arguments, only the rate, decay
    and momentum have an effect: the momentum is always Nesterov's, and there are always 5 iterations.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            stepping = [p for p in group["params"] if p.grad is not None]
            for parameters in _batches(stepping):
                self._step_stacked(parameters, group)
        return loss

    def _step_stacked(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step on ``parameters``, all of one shape."""
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
        gradients = [local(cast(Tensor, p.grad)) for p in parameters]
        buffers = [local(state["momentum_buffer"]) for state in states]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
        orthogonal = _orthogonal(list(directions), like=parameters[0])
        steps, to_unit_rms = self._scaled(orthogonal, parameters)
        parts = [local(p) for p in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * to_unit_rms
        torch._foreach_add_(parts, list(steps.to(parts[0].dtype).unbind()), alpha=-rate)

    def _scaled(self, orthogonal: Tensor, parameters: list[Tensor]) -> tuple[Tensor, float]:
        """The directions of the step, and the factor that makes their root mean square 1.

        Args:
            orthogonal: (b, m, n), the local parts of the orthogonalised momentum of ``parameters``.
        """
        return orthogonal, max(parameters[0].shape) ** 0.5


def orthogonalize(
    matrices: Tensor, steps: int = 5, *, tall: bool | None = None, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Bring the singular values of ``matrices`` near 1 by Newton-Schulz iterations.

    The quintic iteration of Jordan et al., https://kellerjordan.github.io/posts/muon. It multiplies a matrix X by a
    polynomial of X Xᵀ, so all iterations together are one polynomial of the first X Xᵀ. In float32 or wider, if X is
    divided into shards or at least twice as long as wide, this polynomial is computed on the small square matrix, and X
    is multiplied once: this takes fewer FLOPs for a long X, and sums X Xᵀ over the shards only once. bfloat16 is not
    precise enough for this, so on a GPU the iteration is on X.

    Args:
        matrices: (b, m, n), or shards of matrices that are divided along their longer side.
        steps: number of iterations.
        tall: for shards: whether m > n in the complete matrices. None: ``matrices`` are complete.
        total: for shards: returns the sum of a tensor over the shards. None: ``matrices`` are complete.

    Returns:
        (b, m, n), in bfloat16 on a GPU, else in the dtype of ``matrices`` (float32 at least).
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
        wide = reduce(torch.matmul, factors) @ wide  # the factors commute
    return wide.mT if tall else wide


def _orthogonal(directions: list[Tensor], like: Tensor) -> Tensor:
    """The local parts of the orthogonalised directions, stacked.

    Args:
        directions: local parts, of one shape, of tensors that are sharded like ``like``.
    """
    tall = like.shape[0] > like.shape[1]
    stacked = torch.stack(directions)
    if not isinstance(like, DTensor):
        return orthogonalize(stacked)
    longer = int(not tall)
    if all(p.is_replicate() or p.is_shard(longer) for p in like.placements):
        return orthogonalize(stacked, tall=tall, total=lambda sums: sum_parts(sums, like))
    # For other placements torch decides what to communicate.
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
    orthogonal = cast(DTensor, orthogonalize(sharded))
    return local(orthogonal.redistribute(placements=placements))


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``parameters`` in groups of one shape, dtype and sharding (DTensor placements).

    A group has at most as many parameters as ``models.stacking.stack_size`` allows.
    """
    kinds: dict[Any, list[Tensor]] = {}
    for p in parameters:
        kinds.setdefault((p.shape, p.dtype, p.placements if isinstance(p, DTensor) else None), []).append(p)
    for group in kinds.values():
        first = group[0]
        # Not the size of the local part: processes with parts of different sizes must make the same batches.
        parts = first.device_mesh.size() if isinstance(first, DTensor) else 1
        size = stack_size(len(group), first.numel() // parts, first.device)
        for start in range(0, len(group), size):
            yield group[start : start + size]


class MuonAndAdamW(CompositeOptimizer):
    """Muon for the group named "linears" and AdamW for the others: Muon is for hidden matrices only.

    Args:
        params: groups with a "name", from ``optim.param_groups.parameter_groups``.
        lr: for groups without an "lr" of their own.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: for groups without a "weight_decay" of their own.
        momentum: of Muon.
    """

    muon: type[Muon] = Muon

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
            parts.append(self.muon(linears, momentum=momentum, **common))
        if others:
            parts.append(torch.optim.AdamW(others, betas=betas, eps=eps, fused=True, **common))
        for group in linears:
            group["decoupled_weight_decay"] = True  # as AdamW marks its own
        super().__init__(parts)
