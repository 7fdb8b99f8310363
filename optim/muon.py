"""torch's Muon as an inner optimizer: for the linears, with AdamW for everything else."""

from typing import Any

import torch

from optim.parts import Parts


class MuonAndAdamW(Parts):
    """torch's Muon for the group named "linears" and AdamW for the others: Muon takes hidden matrices only.

    Muon's step is scaled to the size of AdamW's ("match_rms_adamw"; Liu et al., arXiv 2502.16982), so that rates and
    decay mean what they mean there.
    """

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
            parts.append(torch.optim.Muon(linears, momentum=momentum, adjust_lr_fn="match_rms_adamw", **common))
        if others:
            parts.append(torch.optim.AdamW(others, betas=betas, eps=eps, fused=True, **common))
        for group in linears:
            group["decoupled_weight_decay"] = True  # as AdamW marks its own
        super().__init__(parts)
