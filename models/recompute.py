"""Saving the recipe of a tensor in place of the tensor: what one pass over memory makes again is not kept.

`remakeable` computes a tensor from inputs that are kept anyway. What saves it for a backward inside `as_recipe` saves
how to make it instead; the first backward that needs it makes it again, for all of them and for its own gradient.
Outside of torch.compile, whose partitioner chooses by itself what to compute again.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Remakeable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.remade = function, None
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs, result = _remake(ctx)
        ctx.remade = None
        return None, *torch.autograd.grad(result, inputs, grad)


def remakeable(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, which saves its inputs and nothing that it makes on the way."""
    return function(*inputs) if torch.compiler.is_compiling() else _Remakeable.apply(function, *inputs)


def as_recipe(made: Tensor) -> AbstractContextManager:
    """Inside, `made` is saved as its recipe by all that saves it whole, if it came from `remakeable`."""
    if torch.compiler.is_compiling() or not isinstance(made.grad_fn, _Remakeable._backward_cls):
        return nullcontext()
    node, storage, size = made.grad_fn, made.untyped_storage()._cdata, made.numel()

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata == storage and tensor.numel() == size:
            return node, tensor.shape
        return tensor

    return saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    node, shape = packed
    return _remake(node)[1].detach().view(shape)


def _remake(node: Any) -> tuple[list[Tensor], Tensor]:
    """The inputs of `node` as leaves, and what its function makes of them; kept with the node until its backward."""
    if node.remade is None:
        inputs = [tensor.detach().requires_grad_() for tensor in node.saved_tensors]
        with torch.enable_grad():
            node.remade = inputs, node.function(*inputs)
    return node.remade


def save_recipes(blocks: Iterable[Any], lean: bool) -> None:
    """Set `lean` in the norms and MLPs of `blocks`, but not where a checkpoint computes again as it is."""
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "lean"):
                module.lean = lean and block.checkpointing == "none"
