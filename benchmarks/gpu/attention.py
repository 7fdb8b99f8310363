"""The attention kernel that torch chooses, and the time of each kernel, with and without document masks.

Times are those of a forward and a backward in bf16. Kernels of other packages are measured if the package is installed.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import NEEDS_GPU, Bench, lacks

# (sequences, tokens, heads, head_dim): 350m as in step_times, the papers' short sequences, 7b.
SHAPES = [(16, 1024, 16, 64), (64, 256, 16, 64), (8, 2048, 32, 128)]
DRY_SHAPES = [(2, 32, 2, 64)]
DOCUMENTS = 5  # per row of a batch
NOT_OFFERED = "No available kernel"  # torch's error if the only allowed backend does not support the tensors
# By the name in the results; None: torch chooses.
BACKENDS = {
    "SDPA as torch chooses": None, "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
FLASH_ATTN = {
    "flash-attn 2": "flash_attn.flash_attn_interface", "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}  # fmt: skip
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # all tensors are (b, t, heads, head_dim)


def run(bench: Bench, case: str) -> None:
    for shape in DRY_SHAPES if bench.dry else SHAPES:
        b, t, heads, dim = shape
        generator = torch.Generator(bench.device).manual_seed(0)
        q, k, v = (
            torch.randn(shape, device=bench.device, generator=generator).bfloat16().requires_grad_() for _ in range(3)
        )
        flops = 3.5 * 4 * b * heads * t * t * dim / 2  # causal half; a backward counts as 2.5 forwards
        bench.add(shape=shape, kernel="torch's choice", chosen=_choice(q, k, v))
        for name, documents, kernel in _kernels(bench, shape):
            with bench.row(shape=shape, kernel=name, documents=documents) as row:
                if isinstance(kernel, str):
                    row["skipped" if kernel == NEEDS_GPU else "lacks"] = kernel
                    continue
                try:
                    row["ms"] = bench.ms(partial(_forward_and_backward, kernel, q, k, v))
                except RuntimeError as error:
                    if NOT_OFFERED not in str(error):
                        raise
                    row["skipped"] = "not supported by this kernel"  # for example, a mask by torch's flash kernel
                    continue
                row["tflop_per_s"] = flops / row["ms"] / 1e9  # full causal triangle, also with document masks


def _choice(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the name of the backend that SDPA chooses for a causal mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name


def _forward_and_backward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> None:
    y = kernel(q, k, v)
    y.backward(torch.ones_like(y))
    q.grad = k.grad = v.grad = None


def _kernels(bench: Bench, shape: tuple[int, int, int, int]) -> Iterator[tuple[str, bool, Kernel | str]]:
    """Yield a kernel's name, whether it masks documents, and the kernel, or the reason why it cannot be measured."""
    b, t, _, _ = shape
    document = (torch.arange(t) // max(1, t // DOCUMENTS)).expand(b, t)
    mask = (document[:, :, None] == document[:, None, :]).tril().unsqueeze(1).to(bench.device)
    first = torch.ones_like(document, dtype=torch.bool)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    ends = F.pad(first.flatten().nonzero().flatten(), (0, 1), value=b * t).to(bench.device, torch.int32)
    for name, backend in BACKENDS.items():
        missing = NEEDS_GPU if backend and not bench.on_gpu else ""
        yield name, False, missing or partial(_sdpa, backend, None)
        yield name, True, missing or partial(_sdpa, backend, mask)
    yield "torch's varlen_attn", True, (NEEDS_GPU if not bench.on_gpu else _varlen(ends, t))
    for name, module in FLASH_ATTN.items():
        missing = (NEEDS_GPU if not bench.on_gpu else lacks(module, name)) or ""
        yield name, False, missing or partial(_flash, module)
        yield name, True, missing or partial(_flash_documents, module, ends, t)


def _sdpa(backend: SDPBackend | None, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)


def _varlen(ends: Tensor, longest: int) -> Kernel | str:
    if missing := lacks("torch.nn.attention.varlen", "torch's varlen_attn"):
        return missing
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    old = "is_causal" in signature(varlen_attn).parameters  # torch 2.10; later versions use a window
    causal = {"is_causal": True} if old else {"window_size": (-1, 0)}

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(q, k, v, ends, ends, longest, longest, **causal)

    return kernel


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _output(import_module(module).flash_attn_func(q, k, v, causal=True))


def _flash_documents(module: str, ends: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _output(
        import_module(module).flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
    )


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output without the log-sum-exp that some versions return as well."""
    return result[0] if isinstance(result, tuple) else result
