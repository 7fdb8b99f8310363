"""Which attention runs where, and the calls, held to the signatures in flash-attn's own distributions and torch's."""

import importlib
import inspect
import re
import sys

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from models import flash_kernels
from models.attention import attention, document_layout, resolve_backend
from models.flash_kernels import FLASH, functions, load_flash
from tests.models.flash_attention import STAND_INS, install, signatures
from tests.models.test_attention import qkv

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BEGINS = torch.tensor([0, 4, 13, 26], dtype=torch.int32)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of the compute capability that it is called with, to ask about."""

    def of(major, minor=0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    of(9)
    return of


def record(monkeypatch, version):
    """The calls of a version's functions, as (name, arguments, keyword arguments)."""
    install(monkeypatch, version)
    calls = []
    for module in {FLASH[version].module, f"{FLASH[version].module}.interface"} & set(sys.modules):
        for name, function in list(vars(sys.modules[module]).items()):
            if callable(function):
                monkeypatch.setattr(sys.modules[module], name, recorded(name, function, calls))
    if version != "flash-attn 4":  # whose operator looks for them when it is called
        functions[version] = tuple(getattr(sys.modules[FLASH[version].module], name) for name in STAND_INS)
    return calls


def recorded(name, function, calls):
    def records(*args, **kwargs):
        calls.append((name, args, kwargs))
        return function(*args, **kwargs)

    return records


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("version", FLASH)
def test_the_calls_bind_to_flash_attns_own_signatures(version, monkeypatch, deterministic):
    own = signatures(version)
    calls = record(monkeypatch, version)
    q, k, v = qkv(2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    options = {"causal": True, "deterministic": deterministic}
    layout = document_layout(BEGINS, version, 2, 13)
    assert layout is BEGINS
    packed = {"max_seqlen_q": 13, "max_seqlen_k": 13}
    for layout, tensors, lengths in ((None, (q, k, v), {}), (BEGINS, [x.flatten(0, 1) for x in (q, k, v)], packed)):
        calls.clear()
        attention(q, k, v, backend=version, layout=layout).sum().backward()
        assert [name for name, *_ in calls] == [["flash_attn_func", "flash_attn_varlen_func"][layout is not None]] + (
            ["_flash_attn_bwd"] if version == "flash-attn 4" else []
        )
        for name, args, kwargs in calls:
            bound = own[name].bind(*args, **kwargs).arguments
            assert all(torch.equal(bound.pop(name), x) for name, x in zip("qkv", tensors, strict=True))
            if name == "_flash_attn_bwd":
                assert bound.pop("out").shape == bound.pop("dout").shape == tensors[0].shape
                assert bound.pop("lse").dtype == torch.float32
            elif version == "flash-attn 4":
                assert bound.pop("return_lse") is True
            if layout is not None:
                assert torch.equal(bound.pop("cu_seqlens_q"), BEGINS) and torch.equal(bound.pop("cu_seqlens_k"), BEGINS)
            assert bound == options | lengths


@pytest.mark.parametrize("version", FLASH)
def test_the_required_arguments_are_in_flash_attns_own_signatures(version):
    for name, own in signatures(version).items():
        lengths = set() if name == "flash_attn_func" else flash_kernels.LENGTHS
        assert {"q", "k", "v"} | flash_kernels.OPTIONS | lengths <= set(own.parameters)


@pytest.mark.parametrize("groups", [False, True])
def test_the_call_of_torchs_varlen_kernel_binds_to_its_signature(gpu, monkeypatch, groups):
    """With the argument for groups of heads and without it, as in torch 2.11."""
    calls = []
    own = inspect.signature(torch_varlen.varlen_attn)
    others = [p for name, p in own.parameters.items() if name != "enable_gqa"]
    gqa = inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY, default=False)

    def varlen_attn(*args, **kwargs):
        calls.append(varlen_attn.__signature__.bind(*args, **kwargs).arguments)
        return args[0]

    varlen_attn.__signature__ = own.replace(parameters=[*others, gqa] if groups else others)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    install(monkeypatch)
    assert resolve_backend("auto", CUDA, torch.bfloat16, 8, documents=True) == "varlen"
    q, k, v = qkv(2)
    y = attention(q, k, v, backend="varlen", layout=BEGINS)
    monkeypatch.delitem(functions, "varlen")
    assert torch.equal(y, q)
    (bound,) = calls
    assert all(torch.equal(bound.pop(n), x.flatten(0, 1)) for n, x in (("query", q), ("key", k), ("value", v)))
    assert bound.pop("cu_seq_q") is BEGINS and bound.pop("cu_seq_k") is BEGINS
    # (-1, 0) is causal, as its documentation says.
    assert bound == {"max_q": 13, "max_k": 13, "window_size": (-1, 0)} | ({"enable_gqa": True} if groups else {})


@pytest.mark.parametrize("installed, major, head_dim, taken", [
    (FLASH, 9, 64, "flash-attn 3"),
    (FLASH, 8, 64, "flash-attn 2"),
    (FLASH, 10, 128, "flash-attn 4"),
    (FLASH, 10, 256, "flash-attn 2"),
    (FLASH, 9, 20, "flash-attn 2"),
    (FLASH, 7, 64, "sdpa"),
    (["flash-attn 4"], 9, 64, "flash-attn 4"),
    (["flash-attn 4"], 8, 64, "sdpa"),
    (["flash-attn 2"], 9, 64, "flash-attn 2"),
    ([], 9, 64, "sdpa"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_takes_the_first_version_that_can_run(gpu, monkeypatch, installed, major, head_dim, taken, dtype):
    install(monkeypatch, *installed)
    gpu(major)
    assert resolve_backend("auto", CUDA, dtype, head_dim) == taken
    assert resolve_backend("sdpa", CUDA, dtype, head_dim, documents=True) == "sdpa"
    if taken != "sdpa":
        assert resolve_backend("flash", CUDA, dtype, head_dim, documents=True) == taken
        assert resolve_backend("auto", CUDA, dtype, head_dim, documents=True) == taken
        return
    lines = ["", "  flash-attn 3: .*", "  flash-attn 4: .*", "  flash-attn 2: .*", "install a version .*"]
    with pytest.raises(ValueError, match=r"^model\.attention=flash: no usable flash-attn" + "\n".join(lines) + "$"):
        resolve_backend("flash", CUDA, dtype, head_dim)


@pytest.mark.parametrize("major, dtype, head_dim, taken", [
    (9, torch.bfloat16, 64, "varlen"), (8, torch.float16, 128, "varlen"), (12, torch.bfloat16, 64, "varlen"),
    (7, torch.float16, 64, "sdpa"), (9, torch.float32, 64, "sdpa"), (9, torch.bfloat16, 20, "sdpa"),
    (9, torch.bfloat16, 256, "sdpa"),
])  # fmt: skip
def test_packed_documents_without_flash_attn(gpu, monkeypatch, major, dtype, head_dim, taken):
    install(monkeypatch)
    gpu(major)
    assert resolve_backend("auto", CUDA, dtype, head_dim, documents=True) == taken
    assert resolve_backend("auto", CUDA, dtype, head_dim) == "sdpa"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert resolve_backend("auto", CUDA, dtype, head_dim, documents=True) == "sdpa"
    functions.pop("varlen", None)


@pytest.mark.parametrize(
    "device, dtype, obstacle",
    [
        (CPU, torch.bfloat16, "flash-attn needs a CUDA device, but the tensors are on cpu"),
        (CUDA, torch.float32, "flash-attn needs bfloat16 or float16, but the tensors are float32"),
    ],
)
def test_where_flash_cannot_run_auto_takes_sdpa_and_flash_is_refused(gpu, monkeypatch, device, dtype, obstacle):
    install(monkeypatch, *FLASH)
    assert resolve_backend("auto", device, dtype, 64) == "sdpa"
    message = re.escape(f"model.attention=flash: {obstacle}; ")
    with pytest.raises(ValueError, match=message + r"set model\.attention=auto or sdpa$"):
        resolve_backend("flash", device, dtype, 64)


def test_an_older_gpu_is_an_obstacle(gpu, monkeypatch):
    install(monkeypatch, *FLASH)
    gpu(7, 5)
    with pytest.raises(ValueError, match=r"compute capability 7\.5"):
        resolve_backend("flash", CUDA, torch.float16, 64)


FUNCTIONS = """
def flash_attn_func(q, k, v, causal=False, deterministic=False): ...
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False
): ...
_flash_attn_bwd = flash_attn_varlen_func
"""
EARLY = FUNCTIONS.replace(", deterministic=False", "")


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Install files (name and contents) as the only flash-attn that can be imported."""
    install(monkeypatch)
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**files):
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__"))
            path.mkdir(parents=True, exist_ok=True)
            path.joinpath("__init__.py").write_text(text)
        importlib.invalidate_caches()

    yield make
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]
    functions.clear()


def test_flash_attn_4_without_2_is_not_taken_for_2(packages, gpu):
    packages(flash_attn__cute=FUNCTIONS, flash_attn__cute__interface=FUNCTIONS)
    assert importlib.import_module("flash_attn").__file__ is None  # the import succeeds: a namespace
    assert resolve_backend("auto", CUDA, torch.bfloat16, 64) == "flash-attn 4"
    gpu(8)
    assert resolve_backend("auto", CUDA, torch.bfloat16, 64) == "sdpa"
    with pytest.raises(ValueError, match=r"flash-attn 2: not installed\n"):
        resolve_backend("flash", CUDA, torch.bfloat16, 64)


@pytest.mark.parametrize(
    "cute, reason",
    [
        (
            EARLY,
            "installed, but this version does not fit (flash_attn.cute.flash_attn_func does not take deterministic)",
        ),
        ("import cutlass_that_is_not_installed", "incomplete (No module named 'cutlass_that_is_not_installed')"),
        ("", "installed, but this version does not fit (flash_attn.cute has no flash_attn_func)"),
        (FUNCTIONS, "not installed"),
    ],
    ids=["early", "without cutlass", "empty", "no backward"],
)
def test_flash_attn_2_brings_a_cute_that_is_not_4(packages, gpu, caplog, cute, reason):
    packages(flash_attn=FUNCTIONS, flash_attn__cute=cute)
    assert resolve_backend("auto", CUDA, torch.bfloat16, 64) == "flash-attn 2"
    assert caplog.messages == []
    assert reason in load_flash("flash-attn 4")


def test_a_broken_flash_attn_is_reported_once_and_skipped(packages, gpu, caplog):
    packages(flash_attn="raise ImportError('undefined symbol: c10')")
    for _ in range(3):
        assert resolve_backend("auto", CUDA, torch.bfloat16, 64) == "sdpa"
    broken = "cannot be imported (undefined symbol: c10)"  # and so is what lies in the same package
    assert caplog.messages == [f"flash-attn 4 {broken}", f"flash-attn 2 {broken}"]
    with pytest.raises(ValueError, match="undefined symbol"):
        resolve_backend("flash", CUDA, torch.bfloat16, 64)


def test_a_missing_flash_attn_is_an_obstacle(packages, gpu):
    with pytest.raises(ValueError, match=r"flash-attn 3: not installed\n  flash-attn 4: not installed\n"):
        resolve_backend("flash", CUDA, torch.bfloat16, 64)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"model\.attention=fast is unknown; choose from auto, sdpa, flash"):
        resolve_backend("fast", CPU, torch.float32, 64)
