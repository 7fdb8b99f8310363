"""Causal self-attention with flash-attn if it is installed, otherwise with torch's kernels.

Tensors have flash-attn's layout (batch, tokens, heads, head_dim). `resolve_backend` chooses the backend from the
setting: "sdpa", "varlen" or a version of flash-attn. `attention` takes it as an argument.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.flash_kernels import choose_flash, functions, varlen_runs

BACKENDS = ("auto", "sdpa", "flash")

log = logging.getLogger(__name__)


def resolve_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, documents: bool = False
) -> str:
    """Choose the attention backend for tensors of `dtype` on `device`, and load its functions.

    Args:
        requested: "sdpa"; "flash" for the first of flash-attn 3, 4 and 2 that is installed and can run; or "auto": the
            same version of flash-attn, else torch's varlen kernel if it can run and `documents` is true, else "sdpa".
        head_dim: the number of features of an attention head.
        documents: whether tokens attend only to their own document.

    Returns:
        "sdpa", "varlen" or a version such as "flash-attn 3".

    Raises:
        ValueError: an unknown name, or "flash" if no version of flash-attn can run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"model.attention={requested} is unknown; choose from {', '.join(BACKENDS)}")
    if requested == "sdpa":
        return "sdpa"
    version, reasons = choose_flash(device, dtype, head_dim)
    if version:
        return version
    if requested == "flash":
        fix = "set model.attention=auto or sdpa"
        if len(reasons) == 1:
            raise ValueError(f"model.attention=flash: {reasons[0]}; {fix}")
        lines = "".join(f"\n  {reason}" for reason in reasons)
        fix = f"install a version that can run on this machine (docs/setup.md), or {fix}"
        raise ValueError(f"model.attention=flash: no usable flash-attn{lines}\n{fix}")
    return "varlen" if documents and varlen_runs(device, dtype, head_dim) else "sdpa"


_logged: set[Any] = set()
KERNELS = {
    SDPBackend.MATH: "math",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
}
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For a cache: cuDNN compiles a plan for each pair of lengths, which change with every cached token."""


def log_kernel(backend: str, x: Tensor, head_dim: int, kv_heads: int, layout: Tensor | None) -> None:
    """Log which kernel computes the attention of a block with input x (b, t, hidden). Each kernel is logged once.

    For the backend "sdpa", it is the kernel that torch chooses. `layout` is from `document_layout`, or None.
    """
    call = (backend, x.device, x.dtype, head_dim, kv_heads, layout is None, torch.is_grad_enabled())
    # Fake tensors are of another type, and no kernel runs on them.
    if call in _logged or type(x) is not Tensor or not log.isEnabledFor(logging.INFO):
        return
    name = {"varlen": "torch's varlen_attn, flash kernel"}.get(backend, backend)
    if backend == "sdpa":
        q = x.unflatten(-1, (-1, head_dim))
        k = q[:, :, :kv_heads]
        kernel = SDPBackend(torch._fused_sdp_choice(**_sdpa_arguments(q, k, k, layout)))
        name = f"torch's SDPA, {KERNELS.get(kernel, kernel.name)} kernel"
    line = f"{'attention' if layout is None else 'attention within documents'}: {name}"
    if line not in _logged:
        log.info(line)
    _logged.update((call, line))


def document_layout(documents: Tensor, backend: str, rows: int, tokens: int) -> Tensor:
    """The `layout` argument of `attention` that separates documents. Does not wait for the device.

    Args:
        documents: int32 (documents + 1,), the first token of each document, counted over all rows in order. Every row
            begins a document, and the last entry is rows · tokens.
        backend: from `resolve_backend`.
        rows: the number of rows of the batch.
        tokens: the number of tokens per row.

    Returns:
        For "sdpa" a mask, bool (rows, 1, tokens, tokens); for other backends `documents` unchanged.
    """
    if backend == "sdpa":
        places = torch.arange(rows * tokens, dtype=torch.int32, device=documents.device)
        numbers = torch.bucketize(places, documents, out_int32=True, right=True).view(rows, tokens)
        return (numbers[:, :, None] == numbers[:, None, :]).tril().unsqueeze(1)
    # The number of documents differs from batch to batch, and the same compiled block must accept any number.
    torch._dynamo.maybe_mark_dynamic(documents, 0)
    return documents


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str, layout: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √head_dim) v under a causal mask (Vaswani et al., arXiv 1706.03762).

    Args:
        q: (b, t, heads, head_dim), the queries of the last t of s tokens.
        k: (b, s, kv_heads, head_dim), like `v`. heads is a multiple of kv_heads: consecutive query heads share a
            key-value head.
        backend: from `resolve_backend`.
        layout: from `document_layout`: a token attends only to tokens of its own document, and s must be t. None: each
            row is one document.

    Returns:
        (b, t, heads, head_dim) in the dtype of q.
    """
    if backend == "sdpa":
        return _sdpa(q, k, v, layout)
    rows, documents = functions[backend]
    # flash-attn's backward sums with atomics by default, in an order that differs from run to run.
    options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if layout is None:
        return _output(rows(q, k, v, **options))
    t = q.shape[1]  # the longest possible document
    lengths = {"cu_seqlens_q": layout, "cu_seqlens_k": layout, "max_seqlen_q": t, "max_seqlen_k": t}
    return _output(documents(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **options)).unflatten(0, (-1, t))


def _output(returned: Tensor | tuple) -> Tensor:
    """The output; earlier builds of flash-attn 3 return a tuple that begins with it."""
    return returned[0] if isinstance(returned, tuple) else returned


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Tensor | None) -> Tensor:
    arguments = _sdpa_arguments(q, k, v, layout)
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(**arguments).transpose(1, 2)
    with sdpa_kernel(WITHOUT_CUDNN):
        return F.scaled_dot_product_attention(**arguments).transpose(1, 2)


def _sdpa_arguments(q: Tensor, k: Tensor, v: Tensor, layout: Tensor | None) -> dict[str, Any]:
    """The arguments of torch's SDPA for those of `attention`."""
    t, s, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    mask, causal = layout, layout is None
    if t != s:
        # SDPA's causal mask assumes that the queries belong to the first tokens. A single new token attends to all.
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t) if t > 1 else None
        causal = False
    if groups > 1 and q.is_cuda and (q.dtype == torch.float32 or mask is not None):
        # The kernels for these cases do not support grouped heads, and the math path would store all t × s scores.
        k, v, groups = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2), 1
    arguments: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "enable_gqa": groups > 1}
    return arguments | {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2)}
