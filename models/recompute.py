"""Recompute cheap tensors in the backward instead of saving them.

`recomputable` computes a tensor from inputs that are kept anyway. Inside `save_as_recipe`, an operation that would save
the tensor for its backward saves a reference to this computation instead. In the backward, the tensor is computed again
once, when it is first needed. Under torch.compile these functions have no effect: the partitioner of the compiler
decides what to recompute.
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
    """Call `function(*inputs)` and save only `inputs` for the backward, which calls `function` again.

    Under torch.compile, this is an ordinary call.
    """
    return function(*inputs) if torch.compiler.is_compiling() else _Recomputable.apply(function, *inputs)


def save_as_recipe(tensor: Tensor) -> AbstractContextManager:
    """A context in which operations do not save `tensor` for their backward, but only how to compute it again.

    Without effect if `tensor` is not a result of `recomputable`, and under torch.compile.
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
    """Set the attribute `lean` of the norms and MLPs in `blocks`: whether the backward computes their results again.

    In blocks with activation checkpointing, which compute these results again anyway, `lean` becomes False. So set the
    checkpointing first.
    """
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "lean"):
                module.lean = lean and block.checkpointing == "none"
