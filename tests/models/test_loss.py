"""The loss in chunks: the plain loss and its gradients, without the logits of all tokens at once."""

import pytest
import torch

from models.convert import convert_linears
from models.grass_linear import GrassLinear
from models.llama import Llama
from tests.helpers import allocations

SIZES = {
    "vocab_size": 3000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
HEADS = ["untied", "tied", "rows", "columns"]
# What sums in another order may differ by, relative to the norm of a tensor.
ROUNDING = {torch.float64: 4e-14, torch.float32: 4e-6, torch.bfloat16: 2**-6}


def batch(tokens=40):
    ids = torch.randint(SIZES["vocab_size"], (2, tokens + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, 3:9] = -100
    return ids[:, :-1], targets


def build(head="untied", dtype=torch.float32, chunk=None):
    model = Llama(**SIZES, tie_word_embeddings=head == "tied", initializer_range=0.2).to_dtype(dtype)
    model.init_weights(0)
    if head in ("rows", "columns"):
        convert_linears(model, rank=8, patterns=["lm_head"], side=head)
    model.loss_chunk_tokens = chunk
    return model


def loss_and_gradients(model):
    if isinstance(model.lm_head, GrassLinear):
        model.lm_head.start_probe(key=7, width=4)
    loss = model(*batch())
    (loss / 72).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(model.lm_head, GrassLinear):
        gradients["probe"] = model.lm_head.stop_probe()
    return loss.detach(), gradients


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_the_plain_path(head, dtype, chunk):
    loss, gradients = loss_and_gradients(build(head, dtype))
    chunked, ours = loss_and_gradients(build(head, dtype, chunk))
    assert chunked.dtype == loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(chunked, loss, rtol=ROUNDING[dtype], atol=0)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        rounding = max(ROUNDING[dtype], ROUNDING[gradient.dtype])  # a probe is fp32 in an fp64 model too
        assert gradient.norm() > 0
        assert (ours[name] - gradient).norm() <= rounding * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_the_loss_is_the_same_where_torch_has_none_in_chunks(head, dtype, monkeypatch):
    loss, gradients = loss_and_gradients(build(head, dtype))
    monkeypatch.setattr("models.loss.TORCH_CHUNKS", False)
    monkeypatch.setattr("torch.nn.functional.linear_cross_entropy", None, raising=False)
    chunked, ours = loss_and_gradients(build(head, dtype, chunk=7))
    torch.testing.assert_close(chunked, loss, rtol=ROUNDING[dtype], atol=0)
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= ROUNDING[dtype] * gradient.norm(), name


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_a_head_under_grass_gets_the_selected_slice_of_the_plain_head_s_gradient(side):
    plain, ours = build(dtype=torch.float64), build(side, torch.float64)
    (_, expected), (_, gradients) = loss_and_gradients(plain), loss_and_gradients(ours)
    head = ours.lm_head
    expected["lm_head.rows"] = expected.pop("lm_head.weight").index_select(head.dim, head.index)
    del gradients["probe"]
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_the_logits_of_all_tokens_are_never_there_at_once(head, dtype):
    """In the forward and backward of training, and in evaluation."""
    logits = 2 * 128 * SIZES["vocab_size"] * dtype.itemsize
    model, ids = build(head, dtype, chunk=8), torch.zeros(2, 128, dtype=torch.int64)
    model(ids, ids).backward()  # the gradients are there from here on

    def evaluate():
        with torch.no_grad():
            model(ids, ids)

    for work in (lambda: model(ids, ids).backward(), evaluate):
        assert allocations(work)[0] < logits
        model.loss_chunk_tokens = None
        assert allocations(work)[0] > logits
        model.loss_chunk_tokens = 8


def test_without_targets_all_logits_are_returned():
    ids, _ = batch()
    assert torch.equal(build(chunk=7)(ids), build()(ids))


def test_only_ignored_targets_give_zero():
    ids, _ = batch()
    assert build(chunk=7)(ids, torch.full_like(ids, -100)).item() == 0
