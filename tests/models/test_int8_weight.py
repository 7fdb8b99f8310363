"""Frozen weights in 8 bits: unbiased rounding, the results of the plain layer, and one dequantised layer at a time."""

import pytest
import torch
from torch import nn

from models.counter_rng import key
from models.grass_linear import GrassLinear
from models.int8_weight import dequantise, quantise
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.inference.init_from import read_weights_at
from pretrain.inference.pretrained import load_pretrained
from pretrain.planner.memory import estimate
from pretrain.setup.checks import check
from pretrain.setup.model import build_model
from tests.helpers import allocations
from tests.tiny_runs import GRASS, TINY, train

SIDES = ["rows", "columns"]
DTYPES = [torch.float32, torch.bfloat16]


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_8_bits(side, dtype=torch.float32, rank=3, shape=(12, 16)):
    layer = GrassLinear(nn.Parameter(values(*shape).to(dtype)), rank, side, int8=True)
    layer.select(torch.tensor([1, 4, 7]))
    with torch.no_grad():
        layer.rows += 0.01 * values(*layer.rows.shape, seed=1).to(dtype)
    return layer


def plain(layer):
    """The ordinary layer of the weight that ``layer`` stands for, with the same rows."""
    weight = dequantise(layer.weight, layer.weight_step, layer.dim, layer.rows.dtype)
    weight.index_copy_(layer.dim, layer.index, layer.rows.detach())
    other = GrassLinear(nn.Parameter(weight), layer.rank, layer.side)
    other.select(layer.index)
    return other


@pytest.mark.parametrize("dim", [0, 1])
def test_codes_are_within_half_a_step_of_their_values_and_nothing_is_clipped(dim):
    x = values(12, 16) * torch.logspace(-6, 6, 16)
    codes, step = quantise(x, dim)
    error = (dequantise(codes, step, dim, torch.float32) - x).abs()
    assert (error <= step.unsqueeze(1 - dim) / 2).all()
    largest = x.abs().amax(1 - dim)
    assert (
        torch.equal(step.log2(), step.log2().round()) and (step >= largest / 127).all() and (step < largest / 63).all()
    )
    exact = dequantise(codes, step, dim, torch.float64)
    assert all(torch.equal(dequantise(codes, step, dim, dtype).double(), exact) for dtype in DTYPES)


def test_zeros_stay_and_values_that_are_not_finite_do_not_become_finite():
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = torch.inf, torch.nan
    found = dequantise(*quantise(x, 0), 0, torch.float32)
    assert torch.equal(found[0], x[0]) and found[1:].isnan().all()


@pytest.mark.parametrize("side", SIDES)
def test_the_mean_of_many_folds_into_8_bits_is_the_folded_value(side):
    """Within the standard error of each element and of them all; rows that stay lose nothing."""
    draws, row = 2000, values(40)
    stack, dim = (torch.stack, 0) if side == "rows" else (torch.column_stack, 1)
    layer = GrassLinear(nn.Parameter(stack([row] * (draws + 2))), draws + 1, side, int8=True)
    with torch.no_grad():
        layer.rows.copy_(stack([row] * (draws + 1)))  # all rows are trained to be what no code stands for
    layer.select(torch.arange(1, draws + 2), rounding_key=key(0, 1))
    assert torch.equal(layer.rows.select(dim, 0), row)
    layer.select(torch.arange(draws + 1), rounding_key=key(0, 2))  # row 0 comes back, the last one leaves
    first, last = (plain(layer).weight.select(dim, i) for i in (0, draws + 1))
    layer.select(torch.zeros(draws + 1, dtype=torch.int64), rounding_key=key(0, 3))
    samples = dequantise(layer.weight, layer.weight_step, dim, torch.float32).movedim(dim, 0)[1 : draws + 1]
    step = layer.weight_step[1].double()
    assert torch.equal(layer.weight_step, step.float().expand(draws + 2))
    share = (row / step).remainder(1)
    z = (samples.double().mean(0) - row.double()) / (step * (share * (1 - share) / draws).sqrt())
    assert z.abs().max() < 5 and abs(z.mean()) * z.numel() ** 0.5 < 4
    assert z.square().mean() == pytest.approx(1, abs=6 * (2 / z.numel()) ** 0.5)
    assert all(((end - row).abs() < step).all() and not torch.equal(end, row) for end in (first, last))


@pytest.mark.parametrize("side", SIDES)
def test_rows_that_leave_as_they_came_leave_the_codes_that_they_were(side):
    layer = in_8_bits(side)
    layer.select(torch.tensor([0, 2, 9]))
    before = layer.weight.clone(), layer.weight_step.clone()
    layer.select(torch.tensor([3, 4, 5]), rounding_key=1)
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.weight_step, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_outputs_gradients_and_probes_are_those_of_the_plain_layer_to_the_bit(side, dtype):
    ours = in_8_bits(side, dtype)
    found = []
    for layer in (ours, plain(ours)):
        layer.start_probe(7, 4)
        x = values(5, 16, seed=2).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(values(5, 12, seed=3).to(dtype))
        found.append([y.detach(), x.grad, layer.rows.grad, layer.stop_probe()])
    assert ours.weight.dtype == torch.int8
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*found, strict=True))


def test_it_compiles_to_one_graph_that_serves_every_index():
    layer, x, graphs = in_8_bits("rows"), values(5, 16, seed=2), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for index in ([0, 1, 2], [3, 7, 11]):
        layer.select(torch.tensor(index), rounding_key=1)
        torch.testing.assert_close(compiled(x), plain(layer)(x))
    assert len(graphs) == 1


def test_weights_are_dequantised_one_layer_at_a_time():
    size, layers = 128, 4
    linears = [nn.Parameter(values(size, size, seed=i)) for i in range(layers)]
    model = nn.Sequential(*(GrassLinear(weight, 2, "rows", int8=True) for weight in linears))
    x = values(2, size)
    model(x).sum().backward()  # gradients are there from here on
    assert allocations(lambda: model(x).sum().backward())[0] < 1.5 * size * size * 4


SMALL = [o for o in TINY if not o.startswith("data=")]


def test_a_model_starts_within_rounding_of_the_plain_one_and_the_planner_counts_a_byte_an_element():
    config, eight = load([*SMALL, *GRASS]), load([*SMALL, *GRASS, "optim.int8_weights=true"])
    models = [build_model(c, torch.device("cpu")) for c in (config, eight)]
    for a, b in zip(*(m.layers[1].mlp.children() for m in models), strict=True):
        theirs = plain(b).weight
        assert 0 < (theirs - a.weight).abs().max() <= b.weight_step.max() / 2
    (before, _), (after, refresh) = estimate(config), estimate(eight)
    linears = sum(layer.weight.numel() for layer in models[1].modules() if isinstance(layer, GrassLinear))
    assert before.components["weights"] - after.components["weights"] == 3 * linears
    assert before.parameters == after.parameters and refresh["weights"] == after.components["weights"]


@pytest.mark.parametrize("side", SIDES)
def test_trained_8_bit_weights_are_read_back_in_full(overrides, side):
    folder, trainer = train(overrides("optim.int8_weights=true", f"optim.side={side}", "train.sample_tokens=0"))
    stored = dict(read_weights_at(folder.path))
    for name, layer in trainer.model.named_modules():
        if isinstance(layer, GrassLinear):
            assert torch.equal(stored[f"{name}.weight"], plain(layer).weight)
    model, _ = load_pretrained(folder.path)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids), trainer.model(ids))
    again = build_model(load(overrides("optim.int8_weights=true")), torch.device("cpu"), read_weights_at(folder.path))
    assert (again(ids) - model(ids)).abs().max() < 0.02 * model(ids).abs().max()


def test_shards_are_refused():
    with pytest.raises(
        ConfigError, match=r"optim\.int8_weights=true: each step size .* set it to false, or use train\.parallel"
    ):
        check(load(["optim.int8_weights=true", "train.parallel=fsdp"]), 2)
