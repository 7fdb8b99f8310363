"""Activation checkpointing: gradients equal to the bit, less memory, and the recomputation that the mode names."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from models.activation_checkpointing import checkpoint_blocks
from models.convert import convert_linears
from models.grass_linear import GrassLinear
from models.llama import Llama
from optim.grass import Grass
from tests.helpers import PAPER, allocations

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
IDS = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(0))
LINEARS = ["dense", "rows", "columns"]


def build(mode, linears="dense", dtype=torch.float32):
    """A model under checkpointing `mode`, its linears dense or under Grass on one side."""
    model = Llama(**SIZES).to_dtype(dtype)
    model.init_weights(0)
    if linears != "dense":
        convert_linears(model, rank=8, side=linears)
    checkpoint_blocks(model.layers, mode)
    return model


def loss_of(model):
    return model(IDS[:, :-1], IDS[:, 1:])


def gradients(model):
    """The gradients of every trainable parameter, and the sketch of every GrassLinear."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GrassLinear)}
    for layer in layers.values():
        layer.start_probe(key=7, width=4)
    loss_of(model).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return grads | {f"{name}.probe": layer.stop_probe() for name, layer in layers.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.abs().max() > 0
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linears", LINEARS)
@pytest.mark.parametrize("mode", ["full", "every:2", "selective"])
def test_gradients_and_probes_are_the_same_to_the_bit(mode, linears, dtype):
    assert_same(gradients(build(mode, linears, dtype)), gradients(build("none", linears, dtype)))


SLOW = [pytest.param(linears, marks=pytest.mark.slow) for linears in ("dense", "columns")]


@pytest.mark.parametrize("linears", ["rows", *SLOW])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_blocks_give_the_same_gradients_and_probes_in_one_graph(mode, linears):
    """Each against the blocks compiled without checkpointing."""
    found = {}
    for each in ("none", mode):
        torch._dynamo.reset()
        model, counter = build(each, linears), CompileCounterWithBackend("aot_eager")
        for layer in model.layers:
            layer.compile(backend=counter, fullgraph=True)
        found[each] = gradients(model)
        assert counter.frame_count == 1
    assert_same(found[mode], found["none"])


@pytest.mark.parametrize("score", ["exact", "sketch"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_training_through_refreshes_ends_in_the_same_rows_and_weights(mode, score):
    ends = []
    for each in ("none", mode):
        model = build(each, "rows")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        grass = Grass(
            model,
            optimizer,
            **PAPER | {"refresh_every": 3, "probe_steps": 2, "score": score, "state_at_refresh": "carry"},
        )
        grass.start(lambda model=model: loss_of(model).backward())
        for _ in range(7):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.state_dict())
    rows_before = build("none", "rows").layers[0].mlp.up_proj.index
    assert not torch.equal(ends[0]["layers.0.mlp.up_proj.index"], rows_before)
    for name, tensor in ends[1].items():
        assert torch.equal(tensor, ends[0][name]), name


def flops(mode, linears):
    with FlopCounterMode(display=False) as counter:
        loss_of(build(mode, linears)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("linears", LINEARS)
def test_selective_computes_no_matrix_product_again_and_full_does(linears):
    once = flops("none", linears)
    assert flops("selective", linears) == once
    assert flops("full", linears) > flops("every:2", linears) > once


def held(mode, linears="dense"):
    """Bytes that a forward leaves for its backward."""
    model = build(mode, linears)
    loss_of(model)
    return allocations(lambda: loss_of(model))[1]


@pytest.mark.parametrize("linears", LINEARS)
def test_less_is_kept_for_the_backward(linears):
    kept = {mode: held(mode, linears) for mode in ("none", "selective", "every:2", "full")}
    assert kept["none"] > kept["selective"] > kept["every:2"] > kept["full"]


def test_full_checkpointing_keeps_only_the_input_of_every_block():
    inputs = SIZES["num_hidden_layers"] * IDS[:, 1:].numel() * SIZES["hidden_size"] * 4
    deeper = SIZES | {"num_hidden_layers": 6}
    kept = []
    for sizes in (SIZES, deeper):
        model = Llama(**sizes)
        checkpoint_blocks(model.layers, "full")
        kept.append(allocations(lambda model=model: loss_of(model))[1])
    assert kept[1] - kept[0] == inputs


@pytest.mark.parametrize("mode", ["some", "every:0", "every:", "every:x", "full:2", "every:-1", ""])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match=r"train\.checkpointing=.*choose none, full, every:N \(from 1\) or selective"):
        checkpoint_blocks(build("none").layers, mode)
