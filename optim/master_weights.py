"""Full-precision masters for low-precision parameters: the optimizer steps on them, the model gets them rounded."""

import torch
from torch import Tensor, nn


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
