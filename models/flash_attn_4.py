"""flash-attn 4 as torch operators.

torch cannot trace flash-attn 4's Python functions: compiled blocks would break into several graphs, checkpointed blocks
would not compile, and selective checkpointing could not keep the results. So we wrap these functions in a custom
operator. Its backward calls flash-attn's private backward function, as torch.nn.attention._fa4 does. That function's
signature has not changed since 4.0.0b3.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("flash_attn_4::forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, longest: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """The output, and for every head and query the logarithm of the softmax denominator, in float32."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    options = {"causal": True, "deterministic": deterministic, "return_lse": True}
    if begins is None:
        return flash_attn_func(q, k, v, **options)
    return flash_attn_varlen_func(q, k, v, **_lengths(begins, longest), **options)


@_forward.register_fake
def _(q, k, v, begins, longest, deterministic):
    *rows, heads, _ = q.shape
    shape = (heads, *rows) if begins is not None else (rows[0], heads, rows[1])
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("flash_attn_4::backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor,
    begins: Tensor | None, longest: int, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd  # type: ignore[import-not-found]

    lengths = {} if begins is None else _lengths(begins, longest)
    q_grad, k_grad, v_grad = _flash_attn_bwd(
        q, k, v, y, grad, sums, causal=True, deterministic=deterministic, **lengths
    )
    return q_grad, k_grad, v_grad


@_backward.register_fake
def _(grad, q, k, v, y, sums, begins, longest, deterministic):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _lengths(begins: Tensor, longest: int) -> dict[str, Any]:
    return {"cu_seqlens_q": begins, "cu_seqlens_k": begins, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _setup(ctx, inputs, output) -> None:
    q, k, v, begins, ctx.longest, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, begins)


def _gradients(ctx, grad, _):
    *tensors, begins = ctx.saved_tensors
    gradients = torch.ops.flash_attn_4.backward(grad, *tensors, begins, ctx.longest, ctx.deterministic)
    return *gradients, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def rows(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool) -> Tensor:
    """`flash_attn_func` of flash-attn 4, for sequences of equal length. Arguments as there, but `causal` must be True.

    Returns only the output (b, t, heads, head_dim).
    """
    assert causal
    return torch.ops.flash_attn_4.forward(q, k, v, None, 0, deterministic)[0]


def documents(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, deterministic: bool,
) -> Tensor:  # fmt: skip
    """`flash_attn_varlen_func` of flash-attn 4, for documents that are stored one after another.

    Arguments as there, but `causal` must be True, and the lengths must be the same for queries and keys (for
    `cu_seqlens_q` and `cu_seqlens_k` one tensor). Returns only the output (tokens, heads, head_dim).
    """
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return torch.ops.flash_attn_4.forward(q, k, v, cu_seqlens_q, max_seqlen_q, deterministic)[0]
