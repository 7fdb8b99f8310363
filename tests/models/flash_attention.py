"""Stand-ins for flash-attn, which needs a GPU, and the signatures in its distributions.

The stand-ins take the arguments that this project gives and no others, and compute the plain formula.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from models import flash_kernels
from models.flash_kernels import FLASH, load_flash

CACHE = Path(__file__).resolve().parents[2] / ".cache"
NO_NETWORK = r"NewConnectionError|ConnectTimeout|Temporary failure in name resolution|Network is unreachable"
# pip asks a source distribution for its metadata, and flash-attn's setup.py then needs torch and would look for CUDA.
DISTRIBUTIONS = {
    "flash-attn 2": (
        "flash-attn==2.8.3.post2 --no-binary :all: --no-build-isolation",
        "flash_attn-2.8.3.post2.tar.gz",
        "flash_attn-2.8.3.post2/flash_attn/flash_attn_interface.py",
    ),
    "flash-attn 4": (
        "flash-attn-4==4.0.0b36",
        "flash_attn_4-4.0.0b36-py3-none-any.whl",
        "flash_attn/cute/interface.py",
    ),
}
FLASH_ATTN_3 = """
def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
): ...
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
): ...
"""
"""As in hopper/flash_attn_interface.py of its repository, late in 2025: there is no distribution of it on PyPI."""


def plain_attention(q, k, v, causal):
    """softmax(q kᵀ / √head_dim) v in fp32 or wider, with flash-attn's layout, causal mask and head groups."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k) * q.shape[3] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


def flash_attn_func(q, k, v, *, causal, deterministic):
    """flash-attn's contract over the plain formula."""
    assert causal and isinstance(deterministic, bool)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return plain_attention(q, k, v, causal)


def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic
):  # fmt: skip
    """flash-attn's contract for sequences of many lengths, one behind the other: each by itself."""
    assert causal and isinstance(deterministic, bool)
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert cu_seqlens_q[0] == 0 and sum(lengths) == len(q) and max_seqlen_q == max_seqlen_k >= max(lengths)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*(x[None] for x in part), causal)[0] for part in parts])


STAND_INS = {function.__name__: function for function in (flash_attn_func, flash_attn_varlen_func)}


def of_4(function):
    """As flash-attn 4 has it: nothing that torch could trace or take gradients through, and it returns a tuple."""

    def untraceable(q, k, v, *, return_lse, **arguments):
        assert return_lse and not torch.compiler.is_compiling()
        *rows, heads, _ = q.shape
        lse = (heads, *rows) if len(rows) == 1 else (rows[0], heads, rows[1])
        return function(q.detach(), k.detach(), v.detach(), **arguments).contiguous(), torch.zeros(lse)

    untraceable.__signature__ = inspect.signature(function)
    return untraceable


def _flash_attn_bwd(
    q, k, v, out, dout, lse, *, causal, deterministic,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    """flash-attn 4's backward, which its operator calls."""
    assert lse.dtype == torch.float32 and out.shape == dout.shape == q.shape
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    lengths |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    options = {"causal": causal, "deterministic": deterministic}

    def gradients():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        y = flash_attn_func(*inputs, **options) if cu_seqlens_q is None else flash_attn_varlen_func(
            *inputs, **lengths, **options
        )  # fmt: skip
        return [x.contiguous() for x in torch.autograd.grad(y, inputs, dout)]

    with ThreadPoolExecutor(1) as another:  # for inside an operator there is no autograd
        return another.submit(gradients).result()


def modules(version):
    """By their names, modules with the functions of a version of flash-attn."""
    name = FLASH[version].module
    made = types.ModuleType(name)
    for function in STAND_INS.values():
        setattr(made, function.__name__, of_4(function) if version == "flash-attn 4" else function)
    if version != "flash-attn 4":
        return {name: made}
    interface = types.ModuleType(f"{name}.interface")
    interface._flash_attn_bwd = _flash_attn_bwd
    return {name: made, f"{name}.interface": interface}


def install(monkeypatch, *versions):
    """These versions of flash-attn, and no others, are there to be imported."""
    monkeypatch.setattr(flash_kernels, "reasons", {})
    for version in flash_kernels.functions.copy():
        monkeypatch.delitem(flash_kernels.functions, version)
    for kernels in FLASH.values():
        monkeypatch.setitem(sys.modules, kernels.module, None)
    # As of a namespace, where only what lies in it is installed.
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    for version in versions:
        for name, module in modules(version).items():
            monkeypatch.setitem(sys.modules, name, module)
    for version in versions:
        assert load_flash(version) is None
        monkeypatch.setitem(flash_kernels.functions, version, flash_kernels.functions[version])


def signatures(version):
    """The signatures of a version's functions, by name, in its distribution, which pip fetches once."""
    wanted = [*STAND_INS, *(["_flash_attn_bwd"] if version == "flash-attn 4" else [])]
    source = FLASH_ATTN_3 if version == "flash-attn 3" else source_of(*DISTRIBUTIONS[version])
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            node.body, node.decorator_list, node.returns = [ast.Pass()], [], None
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                argument.annotation = None
            exec(ast.unparse(node), found)
    return {name: inspect.signature(found[name]) for name in wanted}


def source_of(wanted, archive, path):
    if not (CACHE / archive).exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            download(wanted, folder)
            os.replace(Path(folder) / archive, CACHE / archive)
    if archive.endswith(".whl"):
        return zipfile.ZipFile(CACHE / archive).read(path)
    with tarfile.open(CACHE / archive) as opened:
        return opened.extractfile(path).read()


def download(wanted, folder):
    command = f"-m pip download {wanted} --no-deps --retries 1 --timeout 30 --dest".split()
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    pip = subprocess.run([sys.executable, *command, folder], env=environment, text=True, capture_output=True)
    output = pip.stdout + pip.stderr
    if pip.returncode and re.search(NO_NETWORK, output):
        pytest.skip(f"no network to fetch {wanted}")
    assert pip.returncode == 0, output
