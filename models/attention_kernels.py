"""Attention kernels besides those of torch's SDPA: flash-attn 2, 3 and 4, and torch's own for packed documents.

Each is a function for rows and one for documents that are packed one behind the other, both called as flash-attn's are.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch

from models import flash_attn_4

log = logging.getLogger(__name__)


class NotThere(Exception):
    """Functions that are not installed, or too old."""


class Kernels(NamedTuple):
    """Where functions are, and what they take besides tensors of half precision on a GPU."""

    module: str
    majors: Container[int]  # of the GPU's compute capability
    head_dim: int  # the largest
    head_dim_of: int  # of which it must be a multiple
    operators: tuple[Callable[..., Any], Callable[..., Any]] | None = None  # where the functions are no operators


FLASH = {
    "flash-attn 3": Kernels("flash_attn_interface", majors=(9,), head_dim=256, head_dim_of=8),
    "flash-attn 4": Kernels(
        "flash_attn.cute", majors=(9, 10, 11), head_dim=128, head_dim_of=8,
        operators=(flash_attn_4.rows, flash_attn_4.documents),
    ),
    "flash-attn 2": Kernels("flash_attn", majors=range(8, 13), head_dim=256, head_dim_of=1),
}  # fmt: skip
"""The versions of flash-attn, in the order in which they are tried."""

VARLEN = Kernels("torch.nn.attention.varlen", majors=range(8, 13), head_dim=192, head_dim_of=8)
"""torch's own kernel for packed documents, flash-attn 2 within torch."""

OPTIONS = {"causal", "deterministic"}
LENGTHS = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
"""The arguments that are given by name."""

functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""Those that are loaded: by version, or "varlen", for rows and for documents. Both return the output, or a tuple that
begins with it."""
reasons: dict[str, str] = {}
"""By version why it could not be loaded: every forward asks, and a failed import is not cheap."""


def choose_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str | None, str]:
    """The first version of flash-attn that is installed and can run; or None, and why none can."""
    if reason := needs(device, dtype):
        return None, f"flash-attn {reason}"
    found = {}
    for version, kernels in FLASH.items():
        reason = load_flash(version) or obstacle(kernels, device, head_dim)
        if reason is None:
            return version, ""
        found[version] = reason
    return None, "; ".join(f"{version}: {reason}" for version, reason in found.items())


def varlen_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's kernel for packed documents can; it is loaded then."""
    if needs(device, dtype) or obstacle(VARLEN, device, head_dim):
        return False
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    load_varlen()
    return True


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """What all of these kernels need that tensors of `dtype` on `device` are not; None where they are."""
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the tensors are {dtype}"
    return None


def obstacle(kernels: Kernels, device: torch.device, head_dim: int) -> str | None:
    """Why they cannot run on the GPU `device` for heads of that size; None where they can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in kernels.majors:
        return f"no kernels for a GPU of compute capability {major}.{minor}"
    if head_dim > kernels.head_dim or head_dim % kernels.head_dim_of:
        return f"heads have {head_dim} features, and not a multiple of {kernels.head_dim_of} up to {kernels.head_dim}"
    return None


def load_flash(version: str) -> str | None:
    """Put the functions of a version of flash-attn into `functions`, or return why that cannot be done."""
    if version not in functions and version not in reasons:
        try:
            functions[version] = _functions_of(FLASH[version])
        except NotThere as error:
            reasons[version] = str(error)
        except Exception as error:  # a build for another torch, CUDA or Python fails in many ways
            reasons[version] = f"cannot be imported ({error})"
            log.warning("%s %s", version, reasons[version])
    return reasons.get(version)


def _functions_of(kernels: Kernels) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions for rows and for documents.

    It looks for them and not for the package: flash-attn 4 makes `import flash_attn` succeed without 2, and 2 brings an
    early `flash_attn.cute` that cannot do all.
    Raises NotThere, and what the import of a broken package does.
    """
    rows = _find(kernels.module, "flash_attn_func", OPTIONS)
    documents = _find(kernels.module, "flash_attn_varlen_func", OPTIONS | LENGTHS)
    if kernels.operators:
        _find(f"{kernels.module}.interface", "_flash_attn_bwd", OPTIONS | LENGTHS)
    return kernels.operators or (rows, documents)


def _find(module: str, name: str, arguments: set[str]) -> Callable[..., Any]:
    """The function of that name, which takes these arguments. Raises NotThere."""
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise NotThere(f"not installed ({error})") from error
    if function is None:
        raise NotThere(f"not installed ({module} has no {name})")
    if missing := arguments - set(inspect.signature(function).parameters):
        raise NotThere(f"too old, or too new: {module}.{name} takes no {', '.join(sorted(missing))}")
    return function


def load_varlen() -> None:
    """Put torch's function for packed documents into `functions`, there called as flash-attn's is."""
    if "varlen" in functions:
        return
    from torch.nn.attention.varlen import varlen_attn  # takes a second, and most runs do not need it

    # Before it had this argument it took groups of heads without being told.
    groups: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def documents(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic):
        assert causal
        # Its backward asks torch itself whether it must be deterministic.
        return varlen_attn(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, 0), **groups
        )

    functions["varlen"] = documents, documents
