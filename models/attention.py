"""Causal self-attention behind one call: flash-attn where it can run, PyTorch's SDPA elsewhere.

Tensors have flash-attn's layout (batch, tokens, heads, head_dim). `resolve_backend` turns what was asked for
into what will run, before any compute; `attention` takes only its answer.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "flash")

log = logging.getLogger(__name__)


def resolve_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend, "sdpa" or "flash", that will run for tensors of `dtype` on `device`; logs it once.

    "auto" takes flash-attn where it can run. Raises ValueError for an unknown name, and for "flash" where it
    cannot run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"model.attention={requested}: unknown; choose one of {', '.join(BACKENDS)}")
    obstacle = None if requested == "sdpa" else flash_obstacle(device, dtype)
    if requested == "flash" and obstacle:
        raise ValueError(f"model.attention=flash: {obstacle}; mend that, or set model.attention=auto or sdpa")
    backend = "sdpa" if requested == "sdpa" or obstacle else "flash"
    _log_once(f"attention runs on {backend}" + (f" ({obstacle})" if obstacle else ""))
    return backend


def flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot take tensors of `dtype` on `device`; None where it can."""
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn needs bfloat16 or float16, the tensors are {dtype}"
    try:
        import flash_attn  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return f"flash-attn cannot be imported ({error})"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs a GPU of compute capability 8.0 or later"
    return None


_said: set[str] = set()


def _log_once(line: str) -> None:
    if log.isEnabledFor(logging.INFO) and line not in _said:
        _said.add(line)
        log.info(line)


def document_layout(documents: Tensor, backend: str) -> Tensor:
    """What `attention` takes to keep the documents of a row apart, from each token's number of its document (b, t).

    For SDPA a mask, bool (b, 1, t, t), which takes its memory-efficient kernel and not its flash one; for flash-attn
    the places where the documents of all rows begin, and the end, int32 (documents + 1,).
    """
    if backend == "flash":
        first = torch.ones_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return F.pad(first.flatten().nonzero().flatten(), (0, 1), value=documents.numel()).to(torch.int32)
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str, layout: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √head_dim) v under a causal mask, on a backend that `resolve_backend` returned.

    q (b, t, heads, head_dim), k and v (b, s, kv_heads, head_dim) with heads a multiple of kv_heads: consecutive query
    heads share a key-value head. The queries are of the last t of s tokens. Returns (b, t, heads, head_dim) in q's
    dtype. With the `layout` of `document_layout`, a token sees only those of its own document.
    """
    if backend == "flash" and layout is not None:
        from flash_attn import flash_attn_varlen_func

        t = q.shape[1]  # the longest that a document can be
        y = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu_seqlens_q=layout,
            cu_seqlens_k=layout,
            max_seqlen_q=t,
            max_seqlen_k=t,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return y.unflatten(0, (-1, t))
    if backend == "flash":
        from flash_attn import flash_attn_func

        # Its backward adds up with atomics, in another order every run, unless asked not to.
        return flash_attn_func(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    t, s = q.shape[2], k.shape[2]
    # SDPA's own mask would stand the queries at the first tokens, where flash-attn's stands them at the last.
    mask = layout if t == s else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    # A constant for torch.compile, where t == s would be a symbol once the length is.
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)
