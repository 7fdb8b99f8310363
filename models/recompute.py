"""Recompute cheap tensors in the backward instead of saving them.

`recomputable` computes a tensor from inputs that are kept anyway. Inside `save_as_recipe`, an operation that would save
the tensor for its backward saves a reference to this computation instead. The first backward that needs the tensor
recomputes it, once for all backwards that need it and for its own gradient. Under torch.compile these functions have no
effect: the partitioner of the compiler decides what to recompute.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Recomputable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.recomputed = function, None
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs, result = _recompute(ctx)
        ctx.recomputed = None
        return None, *torch.autograd.grad(result, inputs, grad)


def recomputable(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call `function(*inputs)` and save its inputs for the backward, but no intermediate results."""
    return function(*inputs) if torch.compiler.is_compiling() else _Recomputable.apply(function, *inputs)


def save_as_recipe(tensor: Tensor) -> AbstractContextManager:
    """A context in which operations that save `tensor` save a reference to its computation instead.

    Without effect if `tensor` is not a result of `recomputable`.
    """
    if torch.compiler.is_compiling() or not isinstance(tensor.grad_fn, _Recomputable._backward_cls):
        return nullcontext()
    node, storage, size = tensor.grad_fn, tensor.untyped_storage()._cdata, tensor.numel()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage()._cdata == storage and saved.numel() == size:
            return node, saved.shape
        return saved

    return saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    node, shape = packed
    return _recompute(node)[1].detach().view(shape)


def _recompute(node: Any) -> tuple[list[Tensor], Tensor]:
    """The inputs of `node` as leaves, and its output computed from them; kept with the node until its backward."""
    if node.recomputed is None:
        inputs = [tensor.detach().requires_grad_() for tensor in node.saved_tensors]
        with torch.enable_grad():
            node.recomputed = inputs, node.function(*inputs)
    return node.recomputed


def set_lean(blocks: Iterable[Any], lean: bool) -> None:
    """Set `lean` in the norms and MLPs of `blocks`, but False in blocks with activation checkpointing.

    A checkpointed block already recomputes its activations.
    """
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "lean"):
                module.lean = lean and block.checkpointing == "none"
