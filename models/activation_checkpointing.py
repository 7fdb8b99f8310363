"""Activation checkpointing by torch's own: what a block keeps for its backward, and what it computes again.

none           everything is kept
full           every block keeps its input alone, and runs again in the backward
every:N        so does every N-th block, and the others keep everything
selective      every block keeps the results of matrix products and attention, and computes the rest again
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
# Of flash-attn 2, 3 and 4, and of torch's varlen kernel.
ATTENTION_NAMESPACES = ("flash_attn", "flash_attn_3", "flash_attn_4", "torch_attn")


def parse(mode: str) -> tuple[str, int]:
    """("none" | "full" | "selective", every how many blocks). Raises ValueError for anything else."""
    name, _, every = mode.partition(":")
    if name == "every" and every.isdecimal() and int(every) > 0:
        return "full", int(every)
    if every or name not in ("none", "full", "selective"):
        raise ValueError(f"train.checkpointing={mode} is unknown; choose none, full, every:N or selective")
    return name, 1


def checkpoint_blocks(blocks: Iterable[Any], mode: str) -> None:
    """Set `block.checkpointing`, which their forward hands to `run`, to what `mode` says."""
    name, every = parse(mode)
    for number, block in enumerate(blocks):
        block.checkpointing = name if number % every == 0 else "none"


@contextmanager
def all_checkpointed(blocks: Iterable[Any]) -> Iterator[None]:
    """Inside, every block keeps only its input, whatever its mode is, and runs again in the backward."""
    blocks = list(blocks)
    modes = [block.checkpointing for block in blocks]
    lean = [module for block in blocks for module in block.modules() if getattr(module, "lean", False)]
    checkpoint_blocks(blocks, "full")
    for module in lean:
        module.lean = False  # a block that runs again keeps everything, for the short time until its backward
    try:
        yield
    finally:
        for block, mode in zip(blocks, modes, strict=True):
            block.checkpointing = mode
        for module in lean:
            module.lean = True


def run(name: str, function: Callable[..., Tensor], *inputs) -> Tensor:
    """`function(*inputs)`, keeping for its backward what "none", "full" or "selective" says. Compiles with its caller.

    Gradients stay the same to the bit, and each is made once: a layer that runs again fills what was saved, no more.
    """
    if name == "none":
        return function(*inputs)
    again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
    if name == "selective":
        return again(*inputs, context_fn=partial(create_selective_checkpoint_contexts, _kept))
    return again(*inputs)


def _kept(context, op, *args, **kwargs) -> CheckpointPolicy:
    product = op in PRODUCTS or op.namespace in ATTENTION_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE
