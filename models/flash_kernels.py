"""Attention kernels other than torch's SDPA: flash-attn 2, 3 and 4, and torch's kernel for packed documents.

flash-attn has two functions: one for rows, sequences of equal length, and one for packed documents, sequences of any
length that are stored one after another. torch's kernel gets the signature of the second.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch

from models import flash_attn_4

log = logging.getLogger(__name__)


class KernelUnavailable(Exception):
    """A version of flash-attn is not installed, or lacks a function or an argument that is used here."""


class Kernels(NamedTuple):
    """A package with attention kernels, and the GPUs and head sizes that they support.

    Attributes:
        module: the Python module with the functions.
        majors: supported major versions of the GPU's compute capability.
        head_dim: the largest head size.
        head_dim_of: the head size must be a multiple of this number.
        operators: torch operators (rows, documents) that wrap the module's functions; None if none are needed.
    """

    module: str
    majors: Container[int]
    head_dim: int
    head_dim_of: int
    operators: tuple[Callable[..., Any], Callable[..., Any]] | None = None


FLASH = {
    "flash-attn 3": Kernels("flash_attn_interface", majors=(9,), head_dim=256, head_dim_of=8),
    "flash-attn 4": Kernels(
        "flash_attn.cute", majors=(9, 10, 11), head_dim=128, head_dim_of=8,
        operators=(flash_attn_4.rows, flash_attn_4.documents),
    ),
    "flash-attn 2": Kernels("flash_attn", majors=range(8, 13), head_dim=256, head_dim_of=1),
}  # fmt: skip
"""The versions of flash-attn, in order of preference."""

VARLEN = Kernels("torch.nn.attention.varlen", majors=range(8, 13), head_dim=192, head_dim_of=8)
"""torch's own kernel for packed documents, flash-attn 2 within torch."""

MISFIT = "installed, but this version does not fit"
OPTIONS = {"causal", "deterministic"}
LENGTHS = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
"""The arguments that are passed by name."""

functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""The loaded functions for (rows, documents), by version or "varlen". They return the output, or a tuple whose first
element is the output."""
reasons: dict[str, str] = {}
"""By version, the reason why it could not be loaded. Cached, because every forward needs it and an import is slow."""


def choose_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str | None, list[str]]:
    """Load the first of flash-attn 3, 4 and 2 that is installed and can run.

    Args:
        device: the device of queries, keys and values.
        dtype: their dtype.
        head_dim: the number of features of an attention head.

    Returns:
        The version, such as "flash-attn 3", and an empty list. If no version can run, None and the reasons: one for all
        versions, or one for each version.
    """
    if reason := needs(device, dtype):
        return None, [f"flash-attn {reason}"]
    found = []
    for version, kernels in FLASH.items():
        reason = load_flash(version) or obstacle(kernels, device, head_dim)
        if reason is None:
            return version, []
        found.append(f"{version}: {reason}")
    return None, found


def varlen_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's kernel for packed documents can run; if so, also load it. Arguments as for `choose_flash`."""
    if needs(device, dtype) or obstacle(VARLEN, device, head_dim):
        return False
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    load_varlen()
    return True


def needs(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel of this module accepts tensors of `dtype` on `device`; None if the kernels do.

    All need a CUDA device, and bfloat16 or float16.
    """
    if device.type != "cuda":
        return f"needs a CUDA device, but the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, but the tensors are {str(dtype).removeprefix('torch.')}"
    return None


def obstacle(kernels: Kernels, device: torch.device, head_dim: int) -> str | None:
    """Why `kernels` cannot run on the GPU `device` for heads of size `head_dim`; None if they can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in kernels.majors:
        return f"no kernels for a GPU of compute capability {major}.{minor}"
    if head_dim > kernels.head_dim or head_dim % kernels.head_dim_of:
        return f"heads have {head_dim} features, but need a multiple of {kernels.head_dim_of} up to {kernels.head_dim}"
    return None


def load_flash(version: str) -> str | None:
    """Load `version` of flash-attn, such as "flash-attn 3", into the dict `functions`, unless that was already tried.

    Returns:
        None, or the reason why the version cannot be loaded.
    """
    if version not in functions and version not in reasons:
        try:
            functions[version] = _functions_of(FLASH[version])
        except KernelUnavailable as error:
            reasons[version] = str(error)
        except Exception as error:  # a build for another torch, CUDA or Python fails in many ways
            reasons[version] = f"cannot be imported ({error})"
            log.warning("%s %s", version, reasons[version])
    return reasons.get(version)


def _functions_of(kernels: Kernels) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions for rows and for documents.

    Checks the functions, not only the package: with flash-attn 4, `import flash_attn` succeeds even without version 2,
    and version 2 contains an early `flash_attn.cute` that lacks some functions.

    Raises:
        KernelUnavailable: a function is missing or takes other arguments.
        Exception: any, from the import of a broken package.
    """
    rows = _find(kernels.module, "flash_attn_func", OPTIONS)
    documents = _find(kernels.module, "flash_attn_varlen_func", OPTIONS | LENGTHS)
    if kernels.operators:
        _find(f"{kernels.module}.interface", "_flash_attn_bwd", OPTIONS | LENGTHS)
    return kernels.operators or (rows, documents)


def _find(module: str, name: str, arguments: set[str]) -> Callable[..., Any]:
    """The function `name` of `module`. Raises KernelUnavailable if it is missing or does not take `arguments`."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        lacks_itself = error.name and f"{module}.".startswith(f"{error.name}.")
        raise KernelUnavailable("not installed" if lacks_itself else f"incomplete ({error})") from error
    function = getattr(found, name, None)
    if function is None and getattr(found, "__file__", None) is None:  # only the folder of another version
        raise KernelUnavailable("not installed")
    if function is None:
        raise KernelUnavailable(f"{MISFIT} ({module} has no {name})")
    if missing := arguments - set(inspect.signature(function).parameters):
        raise KernelUnavailable(f"{MISFIT} ({module}.{name} does not take {', '.join(sorted(missing))})")
    return function


def load_varlen() -> None:
    """Load torch's function for packed documents as `functions["varlen"]`, with flash-attn's signature."""
    if "varlen" in functions:
        return
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import, and most runs do not use it

    # Versions without this argument always support grouped heads.
    groups: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def documents(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic):
        assert causal
        # Its backward reads torch's setting for deterministic algorithms.
        return varlen_attn(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, 0), **groups
        )

    functions["varlen"] = documents, documents
