"""Cross-entropy of the next token, summed in nats, from logits or without ever holding all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.precision import at_least_fp32

TORCH_CHUNKS = hasattr(nn, "LinearCrossEntropyOptions")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Scalar in fp32 (fp64 for fp64) from logits (n, vocab) and targets (n,) int64, -100 where none."""
    logits = logits.to(at_least_fp32(logits.dtype))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def chunked_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """`cross_entropy(head(x), targets)` for x (n, hidden), with the logits of `chunk` tokens at a time.

    An ordinary head in fp32 or fp64 takes torch's own chunked loss where torch has one (from 2.13 on), which makes the
    gradients in the forward. Elsewhere the chunks go through the module, which may be a GrassLinear or sharded, and are
    computed again in the backward: one more product with the head. In bf16 torch's would return the loss itself,
    thousands of nats, in bf16.
    """
    if TORCH_CHUNKS and type(head) is nn.Linear and x.dtype == at_least_fp32(x.dtype):
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return F.linear_cross_entropy(x, head.weight, targets, ignore_index=-100, reduction="sum", options=options)
    nats = torch.zeros((), dtype=at_least_fp32(x.dtype), device=x.device)
    for some, wanted in zip(x.split(chunk), targets.split(chunk), strict=True):
        nats = nats + checkpoint(_through_head, head, some, wanted, use_reentrant=False, preserve_rng_state=False)
    return nats


def _through_head(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(x), targets)
