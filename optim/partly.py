"""A step of an optimizer on some of its parameters."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def only(optimizer: torch.optim.Optimizer, parameters: Collection[Tensor]) -> Iterator[None]:
    """Inside, ``optimizer`` knows of ``parameters`` alone; its groups and their other settings stay."""
    held = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p in parameters]
    try:
        yield
    finally:
        for group, all_of_it in zip(optimizer.param_groups, held, strict=True):
            group["params"] = all_of_it
