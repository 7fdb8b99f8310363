"""A limit on how fast the norm of a gradient may grow, for use in place of clipping.

Fira's norm-growth limiter (arXiv 2410.01623, section 4.2): if the norm of a gradient exceeds γ times its norm in the
previous step, the gradient is scaled down to γ times that norm. The limiter stores one scalar per matrix.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.dtensor import local, sum_parts


class NormGrowthLimiter:
    """Limits the norm of each parameter's gradient to ``limit`` times its norm after the previous call.

    The first gradient, and a gradient after a zero one, is not limited. ``norms`` (parameters,) float32 has the norms
    after the latest call.

    Args:
        parameters: at least one, all sharded in the same way; each gradient is limited independently of the others.
        limit: γ > 1; 1.01 in Fira and APOLLO.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], limit: float):
        self.parameters, self.limit = list(parameters), limit
        # (number of parameters,) float32, on their device; part of a checkpoint. The first gradients are not limited.
        self.norms = torch.full((len(self.parameters),), torch.inf, device=self.parameters[0].device)

    @torch.no_grad()
    def __call__(self) -> None:
        """Scale the gradients in place, without waiting for a device. Every parameter must have a gradient."""
        gradients: list[Tensor] = [local(p.grad) for p in self.parameters if p.grad is not None]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        norms = sum_parts(norms.square(), self.parameters[0]).sqrt()
        factors = (self.limit * self.norms / norms).nan_to_num(nan=1.0).clamp_max(1.0)
        torch._foreach_mul_(gradients, [factor.to(g.dtype) for factor, g in zip(factors, gradients, strict=True)])
        limited = norms * factors
        self.norms.copy_(torch.where(limited > 0, limited, torch.inf))  # nothing can grow from zero

    def one_for_each(self) -> dict[nn.Parameter, "NormGrowthLimiter"]:
        """By parameter, a new limiter for it alone, whose ``norms`` are a view of this object's ``norms``."""
        singles = {p: NormGrowthLimiter([p], self.limit) for p in self.parameters}
        for i, single in enumerate(singles.values()):
            single.norms = self.norms[i : i + 1]
        return singles
