"""Scores of rows, and their agreement over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from models.counter_rng import key

SCORES = ("exact", "sketch")


def _require_agreement(indices: list[Tensor], device: torch.device) -> None:
    """Raise RuntimeError unless every process chose the same rows: compares one hash."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    fingerprint = key(0, *(str(index.tolist()) for index in indices))
    if "cpu:" in str(dist.get_backend_config()):
        device = torch.device("cpu")  # between the hosts, which is no wait for a device
    low_high = torch.tensor([-fingerprint, fingerprint], device=device)
    dist.all_reduce(low_high, op=dist.ReduceOp.MAX)
    if low_high.tolist() != [-fingerprint, fingerprint]:
        raise RuntimeError("the processes chose different rows: their scores or seeds differ")
