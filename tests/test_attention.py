"""SDPA and the call to flash-attn, held to the plain formula and to flash-attn's own signature.

flash-attn needs a GPU. What can be held without one is the call: its arguments bind to the signature in
flash-attn's source distribution, and a plain function with that signature, put in its place, gives what SDPA
gives.
"""

import ast
import inspect
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
import torch

from models import attention as attention_module
from models.attention import attention, document_layout, resolve_backend
from models.llama import Block, rope_tables

FLASH_ATTN = "2.8.3.post2"
CACHE = Path(__file__).parent.parent / ".cache"
NO_NETWORK = r"NewConnectionError|ConnectTimeout|Temporary failure in name resolution|Network is unreachable"


def plain_attention(q, k, v, causal, softmax_scale=None):
    """softmax(q kᵀ · scale) v in fp32 or wider, with flash-attn's layout, causal mask and head groups."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group, scale = q.shape[2] // k.shape[2], softmax_scale or q.shape[3] ** -0.5
    k, v = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash-attn's contract over the plain formula; refuses what the formula does not do."""
    asked = (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs)
    assert asked == (0.0, (-1, -1), 0.0, None, False)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    return plain_attention(q, k, v, causal, softmax_scale)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn's contract for sequences of many lengths, one behind the other: each by itself."""
    asked = (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs, block_table)
    assert asked == (0.0, (-1, -1), 0.0, None, False, None)
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert cu_seqlens_q[0] == 0 and sum(lengths) == len(q) and max_seqlen_q == max_seqlen_k >= max(lengths)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*(x[None] for x in part), causal, softmax_scale)[0] for part in parts])


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for flash-attn, importable by its name."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def no_flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)


@pytest.fixture(scope="session")
def flash_attn_signatures():
    """The signatures of flash-attn's functions in its source distribution, fetched by pip once, by name."""
    name = f"flash_attn-{FLASH_ATTN}"
    sdist = CACHE / f"{name}.tar.gz"
    if not sdist.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            download(folder)
            os.replace(Path(folder) / sdist.name, sdist)
    with tarfile.open(sdist) as archive:
        source = archive.extractfile(f"{name}/flash_attn/flash_attn_interface.py").read()
    namespace = {"torch": torch}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in ("flash_attn_func", "flash_attn_varlen_func"):
            node.body, node.decorator_list = [ast.Pass()], []
            exec(ast.unparse(node), namespace)
    return {name: inspect.signature(namespace[name]) for name in ("flash_attn_func", "flash_attn_varlen_func")}


def download(folder):
    # pip asks the package for its metadata, and its setup.py then needs torch and would look for CUDA.
    wanted = f"flash-attn=={FLASH_ATTN} --no-deps --no-binary :all: --no-build-isolation"
    command = f"-m pip download {wanted} --retries 1 --timeout 30 --dest".split()
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    pip = subprocess.run([sys.executable, *command, folder], env=environment, text=True, capture_output=True)
    output = pip.stdout + pip.stderr
    if pip.returncode and re.search(NO_NETWORK, output):
        pytest.skip(f"no network to fetch flash-attn {FLASH_ATTN}'s source distribution")
    assert pip.returncode == 0, output


def qkv(kv_heads, dtype=torch.float64, length=13):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, 8) for heads in (6, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def outcome(backend, kv_heads, dtype):
    """The output and the gradients of q, k, v."""
    inputs = qkv(kv_heads, dtype)
    output = attention(*inputs, backend=backend)
    weights = torch.randn(output.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_sdpa_is_causal_grouped_softmax_attention(kv_heads):
    q, k, v = qkv(kv_heads)
    expected = plain_attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q, k, v, backend="sdpa"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_flash_path_equals_sdpa_path(flash_attn, kv_heads, dtype, tolerance):
    flash, sdpa = (outcome(backend, kv_heads, dtype) for backend in ("flash", "sdpa"))
    for ours, theirs in zip(flash, sdpa, strict=True):
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_block_on_flash_equals_block_on_sdpa(flash_attn, compiled):
    torch.manual_seed(0)
    block = Block(48, 80, heads=6, kv_heads=2, eps=1e-6).double()
    x = torch.randn(2, 16, 48, dtype=torch.float64)
    tables = rope_tables(16, 8, 10000.0, like=x)
    expected = block(x, *tables, "sdpa")
    if compiled:
        torch._dynamo.reset()
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(block(x, *tables, "flash"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_call_binds_to_flash_attns_own_signature(flash_attn, flash_attn_signatures, monkeypatch, deterministic):
    calls = []
    monkeypatch.setattr(flash_attn, "flash_attn_func", lambda *args, **kwargs: calls.append((args, kwargs)))
    q, k, v = qkv(2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    attention(q, k, v, backend="flash")
    ((args, kwargs),) = calls
    bound = flash_attn_signatures["flash_attn_func"].bind(*args, **kwargs).arguments
    assert all(bound.pop(name) is tensor for name, tensor in (("q", q), ("k", k), ("v", v)))
    assert bound == {"causal": True, "deterministic": deterministic}


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_call_for_documents_binds_to_flash_attns_own_signature(
    flash_attn, flash_attn_signatures, monkeypatch, deterministic
):
    calls = []
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", lambda *a, **kw: calls.append((a, kw)) or a[0])
    q, k, v = qkv(2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    layout = document_layout(torch.tensor([[0] * 4 + [1] * 9, [0] * 13]), "flash")
    assert layout.tolist() == [0, 4, 13, 26]
    attention(q, k, v, backend="flash", layout=layout)
    ((args, kwargs),) = calls
    bound = flash_attn_signatures["flash_attn_varlen_func"].bind(*args, **kwargs).arguments
    assert all(torch.equal(bound.pop(name), x.flatten(0, 1)) for name, x in (("q", q), ("k", k), ("v", v)))
    assert bound.pop("cu_seqlens_q") is layout and bound.pop("cu_seqlens_k") is layout
    assert bound == {"max_seqlen_q": 13, "max_seqlen_k": 13, "causal": True, "deterministic": deterministic}


def test_the_stand_ins_have_flash_attns_own_signatures(flash_attn_signatures):
    for stand_in in (flash_attn_func, flash_attn_varlen_func):
        assert inspect.signature(stand_in) == flash_attn_signatures[stand_in.__name__]


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_is_taken_for_half_precision_on_cuda(flash_attn, ampere, dtype):
    assert resolve_backend("auto", CUDA, dtype) == resolve_backend("flash", CUDA, dtype) == "flash"
    assert resolve_backend("sdpa", CUDA, dtype) == "sdpa"


@pytest.mark.parametrize(
    "device, dtype, obstacle",
    [
        (CPU, torch.bfloat16, "flash-attn needs a CUDA device, the tensors are on cpu"),
        (CUDA, torch.float32, "flash-attn needs bfloat16 or float16, the tensors are torch.float32"),
    ],
)
def test_where_flash_cannot_run_auto_takes_sdpa_and_flash_is_refused(flash_attn, ampere, device, dtype, obstacle):
    assert resolve_backend("auto", device, dtype) == "sdpa"
    message = re.escape(f"model.attention=flash: {obstacle}; ")
    with pytest.raises(ValueError, match=message + r".* model\.attention=auto or sdpa"):
        resolve_backend("flash", device, dtype)


def test_a_missing_flash_attn_is_an_obstacle(no_flash_attn, ampere):
    assert resolve_backend("auto", CUDA, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match=r"model\.attention=flash: flash-attn cannot be imported"):
        resolve_backend("flash", CUDA, torch.bfloat16)


def test_an_older_gpu_is_an_obstacle(flash_attn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_backend("auto", CUDA, torch.float16) == "sdpa"
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        resolve_backend("flash", CUDA, torch.float16)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"model\.attention=fast: unknown; choose one of auto, sdpa, flash"):
        resolve_backend("fast", CPU, torch.float32)


def test_the_backend_that_runs_is_said_once(caplog):
    attention_module._said.clear()
    with caplog.at_level(logging.INFO, logger="models.attention"):
        for _ in range(3):
            resolve_backend("auto", CPU, torch.float32)
    assert caplog.messages == ["attention runs on sdpa (flash-attn needs a CUDA device, the tensors are on cpu)"]
