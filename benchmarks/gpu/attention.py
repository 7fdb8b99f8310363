"""The attention kernel that torch chooses, and the time of each kernel, with and without document masks.

Times are those of a forward and a backward in bf16. Kernels of other packages are measured if the package is installed.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.bench import NEEDS_GPU, Bench
from models.attention import attention, document_layout
from models.flash_kernels import FLASH, load_flash, obstacle, varlen_runs

# (sequences, tokens, heads, head_dim): 350m as in step_times, the papers' short sequences, 7b.
SHAPES = [(16, 1024, 16, 64), (64, 256, 16, 64), (8, 2048, 32, 128)]
DRY_SHAPES = [(2, 32, 2, 64)]
DOCUMENTS = 5  # per row of a batch
NOT_SUPPORTED = "not supported by this GPU or build of torch"
NOT_OFFERED = "No available kernel"  # torch's error if the only allowed backend does not support the tensors
# By the name in the results; None: torch chooses.
BACKENDS = {
    "SDPA as torch chooses": None, "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
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
                    row["skipped"] = kernel
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
    b, t, _, dim = shape
    begins = torch.arange(b)[:, None] * t + torch.arange(0, t, max(1, t // DOCUMENTS))
    documents = F.pad(begins.flatten(), (0, 1), value=b * t).to(bench.device, torch.int32)
    mask = document_layout(documents, "sdpa", b, t)
    for name, kernel in BACKENDS.items():
        missing = NEEDS_GPU if kernel and not bench.on_gpu else None
        yield name, False, missing or partial(_sdpa, kernel, None)
        yield name, True, missing or partial(_sdpa, kernel, mask)
    varlen = partial(attention, backend="varlen", layout=documents)
    missing = None if varlen_runs(bench.device, torch.bfloat16, dim) else NOT_SUPPORTED
    yield "torch's varlen_attn", True, (missing or varlen) if bench.on_gpu else NEEDS_GPU
    for name, limits in FLASH.items():
        missing = (load_flash(name) or obstacle(limits, bench.device, dim)) if bench.on_gpu else NEEDS_GPU
        yield name, False, missing or partial(attention, backend=name)
        yield name, True, missing or partial(attention, backend=name, layout=documents)


def _sdpa(kernel: SDPBackend | None, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel) if kernel is not None else nullcontext():
        return attention(q, k, v, backend="sdpa", layout=mask)
