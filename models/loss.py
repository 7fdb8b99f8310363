"""Summed cross-entropy of the next token in nats, with all logits at once or in chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.precision import at_least_fp32

TORCH_CHUNKS = hasattr(nn, "LinearCrossEntropyOptions")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy in nats, summed over n tokens, of logits (n, vocab) and targets (n,) int64; -100: no target.

    Returns a scalar in float32 (float64 for float64 logits).
    """
    logits = logits.to(at_least_fp32(logits.dtype))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def chunked_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """`cross_entropy(head(x), targets)` for x (n, hidden), with the logits of `chunk` tokens at a time.

    For a plain `nn.Linear` head in float32 or float64, uses torch's chunked loss (from torch 2.13), which computes
    gradients in the forward. All other heads (a GrassLinear, a sharded head, a head in bfloat16) are called chunk by
    chunk, and again in the backward: one more matmul with the head. In bfloat16, torch's function is not used because
    it returns the loss, thousands of nats, in bfloat16.
    """
    if TORCH_CHUNKS and type(head) is nn.Linear and x.dtype == at_least_fp32(x.dtype):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return F.linear_cross_entropy(x, head.weight, targets, ignore_index=-100, reduction="sum", options=options)
    nats = torch.zeros((), dtype=at_least_fp32(x.dtype), device=x.device)
    for x_chunk, target_chunk in zip(x.split(chunk), targets.split(chunk), strict=True):
        nats = nats + checkpoint(_loss_of, head, x_chunk, target_chunk, use_reentrant=False, preserve_rng_state=False)
    return nats


def _loss_of(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(x), targets)
