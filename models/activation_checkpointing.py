"""Activation checkpointing with torch's own: the activations that a block keeps for its backward, by mode.

none           all
full           only its input; the block runs again in the backward
every:N        every N-th block as "full", the others as "none"
selective      the results of matrix products and attention; the rest is computed again
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
    """("none" | "full" | "selective", N) from ``train.checkpointing``: it applies to every N-th block.

    Raises:
        ValueError: any other mode.
    """
    name, _, every = mode.partition(":")
    if name == "every" and every.isdecimal() and int(every) > 0:
        return "full", int(every)
    if every or name not in ("none", "full", "selective"):
        raise ValueError(f"train.checkpointing={mode} is unknown; choose none, full, every:N or selective")
    return name, 1


def checkpoint_blocks(blocks: Iterable[Any], mode: str) -> None:
    """Set `checkpointing` of each block, which its forward passes to `run`, by the mode of ``train.checkpointing``."""
    name, every = parse(mode)
    for number, block in enumerate(blocks):
        block.checkpointing = name if number % every == 0 else "none"


@contextmanager
def all_checkpointed(blocks: Iterable[Any]) -> Iterator[None]:
    """A context in which every block is checkpointed in full, whatever its mode."""
    blocks = list(blocks)
    modes = [block.checkpointing for block in blocks]
    lean = [module for block in blocks for module in block.modules() if getattr(module, "lean", False)]
    checkpoint_blocks(blocks, "full")
    for module in lean:
        module.lean = False  # a block that runs again keeps all activations, for the short time until its backward
    try:
        yield
    finally:
        for block, mode in zip(blocks, modes, strict=True):
            block.checkpointing = mode
        for module in lean:
            module.lean = True


def run(mode: str, function: Callable[..., Tensor], *inputs) -> Tensor:
    """`function(*inputs)`, checkpointed as "none", "full" or "selective". Compiles together with its caller.

    Gradients are the same to the bit in all modes. Each is computed once: a layer that runs again only recomputes its
    saved tensors.
    """
    if mode == "none":
        return function(*inputs)
    checkpointed = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)  # no block is random
    if mode == "selective":
        return checkpointed(*inputs, context_fn=partial(create_selective_checkpoint_contexts, _policy))
    return checkpointed(*inputs)


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    product = op in PRODUCTS or op.namespace in ATTENTION_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE
