"""Parameter groups, their learning rates and weight decay."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.convert import ATTENTION_AND_MLP, matches
from models.grass_linear import GrassLinear
from optim.composite import CompositeOptimizer


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    linear_lr: float,
    weight_decay: float = 0.0,
    patterns: Sequence[str] = ATTENTION_AND_MLP,
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into three groups, which have a "name", and a "peak_lr" for ``set_rates``.

    - ``linears``: rate ``linear_lr``; the rows of GrassLinear layers, and the weights of linear layers that match
      ``patterns``; so with the default patterns, the same layers under Grass and in full-rank training
    - ``embeddings``: rate ``lr``; embeddings, head and all other matrices
    - ``norms``: rate ``lr`` without weight decay; vectors

    Args:
        model: its trainable parameters are grouped.
        lr: peak learning rate of embeddings and norms.
        linear_lr: peak learning rate of the group "linears".
        weight_decay: factor, as defined by the optimizer.
        patterns: globs of module names, see ``models.convert.matches``.

    Returns:
        Groups for a torch.optim.Optimizer, whose "params" are (name, parameter) pairs. Empty groups are left out.
    """
    linear_weights = {
        p
        for name, module in model.named_modules()
        if isinstance(module, GrassLinear)
        or (isinstance(module, nn.Linear) and any(matches(name, q) for q in patterns))
        for p in module.parameters()
        if p.requires_grad
    }
    groups: dict[str, dict[str, Any]] = {
        "linears": {"lr": linear_lr, "weight_decay": weight_decay},
        "embeddings": {"lr": lr, "weight_decay": weight_decay},
        "norms": {"lr": lr, "weight_decay": 0.0},
    }
    for group_name, group in groups.items():
        group |= {"name": group_name, "peak_lr": group["lr"], "params": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "linears" if p in linear_weights else "embeddings" if p.ndim > 1 else "norms"
            groups[kind]["params"].append((name, p))
    return [group for group in groups.values() if group["params"]]


def decay_factor(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """The factor 1 - lr · decay by which a step scales the parameters of ``group``; 1 if decay is not decoupled."""
    if isinstance(optimizer, CompositeOptimizer):
        return next(decay_factor(part, group) for part in optimizer.parts if any(g is group for g in part.param_groups))
    decoupled = (
        isinstance(optimizer, torch.optim.Adafactor | torch.optim.Muon)
        or group.get("decoupled_weight_decay", False)
        or getattr(optimizer, "is_adamw", False)  # torchao's
    )
    return 1.0 - float(group["lr"]) * group["weight_decay"] if decoupled else 1.0


def set_rates(optimizer: torch.optim.Optimizer, factor: float, linears: float = 1.0) -> None:
    """Set each group's "lr" to its "peak_lr" times ``factor``, and in the group "linears" also times ``linears``."""
    for group in optimizer.param_groups:
        lr = group["peak_lr"] * factor * (linears if group["name"] == "linears" else 1.0)
        if torch.is_tensor(group["lr"]):  # torchao keeps rates in tensors
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
