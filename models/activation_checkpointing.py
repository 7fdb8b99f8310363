"""Activation checkpointing with torch.utils.checkpoint. By mode, a block keeps for its backward:

none           all activations
full           only its input; the block runs again in the backward
every:N        the first of every N blocks as "full", the other blocks as "none"
selective      the results of matmuls and attention; everything else is recomputed
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
    """Split a value of ``train.checkpointing`` into the mode of a block and the N of "every:N".

    Returns:
        ("full", N) for "every:N"; (mode, 1) for "none", "full" and "selective".

    Raises:
        ValueError: any other value.
    """
    name, _, every = mode.partition(":")
    if name == "every" and every.isdecimal() and int(every) > 0:
        return "full", int(every)
    if every or name not in ("none", "full", "selective"):
        raise ValueError(f"train.checkpointing={mode} is unknown; choose none, full, every:N (from 1) or selective")
    return name, 1


def checkpoint_blocks(blocks: Iterable[Any], mode: str) -> None:
    """Set the attribute `checkpointing` of each block.

    Args:
        blocks: in model order.
        mode: "none", "full", "selective", or "every:N": "full" for the first of every N blocks, "none" for the others.

    Raises:
        ValueError: any other mode.
    """
    name, every = parse(mode)
    for number, block in enumerate(blocks):
        block.checkpointing = name if number % every == 0 else "none"


@contextmanager
def all_checkpointed(blocks: Iterable[Any]) -> Iterator[None]:
    """A context in which every block has mode "full". At its end, every block gets back its own mode."""
    blocks = list(blocks)
    modes = [block.checkpointing for block in blocks]
    lean = [module for block in blocks for module in block.modules() if getattr(module, "lean", False)]
    checkpoint_blocks(blocks, "full")
    for module in lean:
        module.lean = False  # a recomputed block keeps all activations only until its backward, so lean saves nothing
    try:
        yield
    finally:
        for block, mode in zip(blocks, modes, strict=True):
            block.checkpointing = mode
        for module in lean:
            module.lean = True


def run(mode: str, function: Callable[..., Tensor], *inputs) -> Tensor:
    """Call `function(*inputs)` with activation checkpointing.

    Compiles together with its caller. Gradients are bit-identical in all modes.

    Args:
        mode: keeps for the backward "none": all activations, "full": only `inputs`, "selective": the results of matmuls
            and attention.
        function: must not use random numbers.
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
