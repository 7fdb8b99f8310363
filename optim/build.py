"""From names and numbers to an optimizer: the parameter groups and the inner optimizer."""

import inspect
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from models.grass_linear import ATTENTION_AND_MLP, GrassLinear

INNER_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    linear_lr: float,
    weight_decay: float = 0.0,
    patterns: Sequence[str] = ATTENTION_AND_MLP,
) -> list[dict[str, Any]]:
    """Every trainable parameter in one of three groups, with ``name`` and ``peak_lr`` for the schedule.

    linears     rate ``linear_lr``: the rows of GrassLinear layers, and the weights of linears that match ``patterns``,
                so that the same patterns name the same layers under Grass and in full-rank training
    embeddings  rate ``lr``: embeddings, head and whatever else is a matrix
    norms       rate ``lr``, never decayed: vectors
    """
    linear_weights = {
        p
        for name, module in model.named_modules()
        if isinstance(module, GrassLinear)
        or (isinstance(module, nn.Linear) and any(fnmatch(name, q) for q in patterns))
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


def inner_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``groups``, fused where torch has it; an option it does not know is left out.

    Raises:
        ValueError: an unknown name.
    """
    if name not in INNER_OPTIMIZERS:
        raise ValueError(f"optim.inner={name!r} is unknown; choose from {', '.join(INNER_OPTIMIZERS)}")
    cls = INNER_OPTIMIZERS[name]
    known = inspect.signature(cls).parameters
    return cls(groups, **{k: v for k, v in ({"fused": True} | options).items() if k in known})


def set_rates(optimizer: torch.optim.Optimizer, factor: float, linears: float = 1.0) -> None:
    """Give every group its peak rate times ``factor``, the linears' times ``linears`` as well."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor * (linears if group["name"] == "linears" else 1.0)
