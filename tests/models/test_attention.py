"""Attention against the plain formula on every backend, and the arguments of SDPA."""

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import attention as attention_module
from models.activation_checkpointing import PRODUCTS, run
from models.attention import attention, document_layout, log_kernel
from models.flash_kernels import FLASH, functions
from models.llama import Block, Llama
from models.rope import rope_tables
from tests.models.flash_attention import flash_attn_varlen_func, install, plain_attention


@pytest.fixture(params=FLASH)
def flash(request, monkeypatch):
    """A version of flash-attn, of which a stand-in is installed."""
    install(monkeypatch, request.param)
    return request.param


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
def test_flash_path_equals_sdpa_path(flash, kv_heads, dtype, tolerance):
    on_flash, on_sdpa = (outcome(backend, kv_heads, dtype) for backend in (flash, "sdpa"))
    for ours, theirs in zip(on_flash, on_sdpa, strict=True):
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_block_on_flash_equals_block_on_sdpa(flash, compiled, mode):
    torch.manual_seed(0)
    block = Block(48, 80, heads=6, kv_heads=2, eps=1e-6).double()
    x = torch.randn(2, 16, 48, dtype=torch.float64, requires_grad=True)
    tables = rope_tables(16, 8, 10000.0, like=x)
    expected = outcome_of(block, x, *tables, "sdpa")
    block.checkpointing = mode
    if compiled:
        torch._dynamo.reset()
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outcome_of(block, x, *tables, flash), expected, rtol=1e-12, atol=1e-12)


def outcome_of(block, x, *others):
    y = block(x, *others)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("heads", [6, 2])
@pytest.mark.parametrize("new", [1, 4])
def test_new_tokens_after_a_cache_attend_as_in_one_sequence(heads, new):
    q, k, v = qkv(heads)
    expected = attention(q, k, v, backend="sdpa")[:, -new:]
    torch.testing.assert_close(attention(q[:, -new:], k, v, backend="sdpa"), expected, rtol=1e-12, atol=1e-12)


def test_one_new_token_has_no_mask_and_no_plan_of_cudnns(monkeypatch):
    calls = []

    def recorded(**arguments):
        calls.append((arguments["attn_mask"], arguments["is_causal"], torch.backends.cuda.cudnn_sdp_enabled()))
        return arguments["query"]

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", recorded)
    q, k, v = qkv(6)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    attention(q, k, v, backend="sdpa")
    attention(q[:, -1:], k, v, backend="sdpa")
    assert calls == [(None, True, before), (None, False, False)] and torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("dtype, masked, grouped", [
    (torch.float32, False, False), (torch.float32, True, False), (torch.bfloat16, True, False),
    (torch.bfloat16, False, True),
])  # fmt: skip
def test_on_a_gpu_groups_are_left_to_kernels_that_take_them(dtype, masked, grouped, monkeypatch):
    q, k, v = qkv(2, dtype)
    layout = document_layout(torch.tensor([0, 4, 13, 26], dtype=torch.int32), "sdpa", 2, 13) if masked else None
    on_a_cpu = attention_module._sdpa_arguments(q, k, v, layout)
    expected = attention(q, k, v, backend="sdpa", layout=layout)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    arguments = attention_module._sdpa_arguments(q, k, v, layout)
    assert on_a_cpu["enable_gqa"] and on_a_cpu["key"].shape[1] == 2
    assert arguments["enable_gqa"] == grouped and arguments["value"].shape[1] == (2 if grouped else 6)
    monkeypatch.undo()
    y = torch.nn.functional.scaled_dot_product_attention(**arguments).transpose(1, 2)
    torch.testing.assert_close(y, expected)


@torch.library.custom_op("grass_tests::documents", mutates_args=())
def documents_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor, longest: int) -> torch.Tensor:
    """As torch's compiler sees flash-attn's kernels and torch's own: an operator that it cannot look into."""
    lengths = {"cu_seqlens_q": begins, "cu_seqlens_k": begins, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return flash_attn_varlen_func(q, k, v, **lengths, causal=True, deterministic=False)


@documents_op.register_fake
def _(q, k, v, begins, longest):
    return torch.empty_like(q)


def test_a_compiled_block_takes_any_number_of_documents(monkeypatch):
    def documents(q, k, v, *, cu_seqlens_q, max_seqlen_q, **_):
        return documents_op(q, k, v, cu_seqlens_q, max_seqlen_q)

    monkeypatch.setitem(functions, "varlen", (documents, documents))
    block = Block(48, 80, heads=6, kv_heads=2, eps=1e-6).double().requires_grad_(False)
    x = torch.randn(2, 16, 48, dtype=torch.float64)
    tables = rope_tables(16, 8, 10000.0, like=x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for begins in ([0, 16, 32], [0, 5, 16, 32], [0, 1, 2, 3, 16, 17, 30, 32], [0, 16, 20, 32]):
        layouts = [document_layout(torch.tensor(begins, dtype=torch.int32), b, 2, 16) for b in ("varlen", "sdpa")]
        expected = block(x, *tables, "sdpa", None, layouts[1])
        torch.testing.assert_close(compiled(x, *tables, "varlen", None, layouts[0]), expected, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("namespace", ["flash_attn", "flash_attn_3", "flash_attn_4", "torch_attn"])
def test_selective_checkpointing_keeps_the_results_of_attention_kernels(namespace):
    """By an operator in that namespace, as the real ones need a GPU; its calls are counted."""
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return 2 * x

    op = torch.library.custom_op(f"{namespace}::of_a_test", forward, mutates_args=())
    op.register_autograd(lambda ctx, grad: 2 * grad)
    x = torch.ones(3, requires_grad=True)
    run("selective", lambda x: op(x.exp()).sin(), x).sum().backward()
    assert calls == [3]
    run("full", lambda x: op(x.exp()).sin(), x).sum().backward()
    assert calls == [3] * 3


def test_the_kernels_of_sdpa_are_all_kept():
    ops = {name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product_") and "backward" not in name}
    known = {op.overloadpacket.__name__ for op in PRODUCTS}
    # Of other devices, and the math one, whose products are kept.
    others = ("math", "mps", "overrideable", "quantized")
    assert {name for name in ops - known if not any(word in name for word in others)} == set()


def tiny(**changes):
    model = Llama(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    model.init_weights(seed=0)
    return model


def test_the_kernel_that_torch_chose_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(attention_module, "_logged", set())
    ids, begins = torch.zeros(2, 16, dtype=torch.int64), torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    with caplog.at_level(logging.INFO, logger="models.attention"):
        for _ in range(3):
            tiny()(ids)
            tiny()(ids, documents=begins)
        assert caplog.messages == [
            "attention: torch's SDPA, flash kernel",
            "attention within documents: torch's SDPA, flash kernel",
        ]
        monkeypatch.setattr(attention_module, "_logged", set())
        caplog.clear()
        with sdpa_kernel(SDPBackend.MATH):
            tiny()(ids)
        assert caplog.messages == ["attention: torch's SDPA, math kernel"]


def test_other_backends_are_logged_by_name(caplog, monkeypatch):
    monkeypatch.setattr(attention_module, "_logged", set())
    x = torch.zeros(2, 16, 32)
    with caplog.at_level(logging.INFO, logger="models.attention"):
        log_kernel("flash-attn 3", x, 8, 2, None)
        log_kernel("varlen", x, 8, 2, torch.tensor([0, 16, 32]))
    assert caplog.messages == [
        "attention: flash-attn 3",
        "attention within documents: torch's varlen_attn, flash kernel",
    ]
