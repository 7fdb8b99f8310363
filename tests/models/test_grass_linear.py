"""The Grass layer against dense autograd: the gradients that its backward computes, and those it never computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.grass_linear import GrassLinear
from tests.helpers import Allocations

OUT, IN, TOKENS, RANK = 12, 20, 7, 3
SIDES = ["rows", "columns"]


def layer_and_data(side, rank=RANK, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    layer = GrassLinear(nn.Parameter(torch.randn(OUT, IN, dtype=dtype)), rank, side, **kwargs)
    x = torch.randn(1, TOKENS, IN, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(1, TOKENS, OUT, dtype=dtype)
    return layer, x, grad_y


def dense_gradients(layer, x, grad_y):
    weight = layer.weight.detach().clone().requires_grad_()
    x = x.detach().clone().requires_grad_()
    F.linear(x, weight).backward(grad_y)
    return weight.grad, x.grad


@pytest.mark.parametrize("side", SIDES)
def test_gradients_are_the_selected_slice_of_the_dense_ones(side):
    layer, x, grad_y = layer_and_data(side)
    index = torch.tensor([1, 5, 10])
    layer.select(index)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight))
    y.backward(grad_y)
    weight_grad, x_grad = dense_gradients(layer, x, grad_y)
    torch.testing.assert_close(layer.rows.grad, weight_grad.index_select(layer.dim, index), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x_grad, rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None


@pytest.mark.parametrize("side", SIDES)
def test_repeated_rows_each_get_their_scaled_gradient(side):
    layer, x, grad_y = layer_and_data(side)
    index, scale = torch.tensor([4, 4, 9]), torch.tensor([2.0, 2.0, 0.5])
    layer.scaled = True
    layer.select(index, scale)
    layer(x).backward(grad_y)
    weight_grad, _ = dense_gradients(layer, x, grad_y)
    expected = weight_grad.index_select(layer.dim, index) * scale.double().unsqueeze(1 - layer.dim)
    torch.testing.assert_close(layer.rows.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_fold_sums_the_scaled_steps_of_a_repeated_row_and_decays_once(side):
    layer, _, _ = layer_and_data(side, dtype=torch.float32)
    layer.scaled = True
    index, scale = torch.tensor([4, 4, 9]), torch.tensor([2.0, 3.0, 0.5])
    layer.select(index, scale)
    before = layer.rows.detach().clone()
    weight = layer.weight.detach().clone()
    steps, decay = torch.randn_like(before), 0.9
    with torch.no_grad():
        layer.rows.copy_(before * decay + steps)
    layer.fold(layer.stepped_draws(before, decay, layer.rows))
    slice_of = (lambda w, i: w[i]) if side == "rows" else (lambda w, i: w[:, i])
    expected = weight.clone()
    slice_of(expected, 4).copy_(0.9 * slice_of(weight, 4) + 2.0 * slice_of(steps, 0) + 3.0 * slice_of(steps, 1))
    slice_of(expected, 9).copy_(0.9 * slice_of(weight, 9) + 0.5 * slice_of(steps, 2))
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.rows, layer.weight.index_select(layer.dim, index))


def shapes_of_backward(side, probe=None):
    layer, x, grad_y = layer_and_data(side)
    if probe:
        layer.start_probe(key=1, width=None if probe == "exact" else 2)
    y = layer(x)
    with Allocations() as allocations:
        y.backward(grad_y)
    return allocations.shapes


@pytest.mark.parametrize("side", SIDES)
def test_a_regular_backward_allocates_nothing_of_the_full_gradient_s_shape(side):
    full = {(OUT, IN), (IN, OUT)}
    assert not shapes_of_backward(side) & full
    assert not shapes_of_backward(side, "sketch") & full
    assert shapes_of_backward(side, "exact") & full  # the detector does detect


@pytest.mark.parametrize("side", SIDES)
def test_weight_gradient_flops_are_the_selected_share_of_dense_ones(side):
    def backward_flops(forward, x, grad_y):
        y = forward(x)
        with FlopCounterMode(display=False) as counter:
            y.backward(grad_y)
        return counter.get_total_flops()

    layer, x, grad_y = layer_and_data(side)
    dense = 2 * TOKENS * IN * OUT
    input_gradient = dense
    weight = layer.weight.detach().clone().requires_grad_()
    assert backward_flops(lambda x: F.linear(x, weight), x, grad_y) == dense + input_gradient
    share = dense * RANK // layer.selectable
    assert backward_flops(layer, x, grad_y) == share + input_gradient


def test_a_column_selection_saves_only_the_selected_inputs():
    def saved_elements(side, probe=False):
        layer, x, _ = layer_and_data(side)
        if probe:
            layer.start_probe(key=1, width=2)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            layer(x)
        return sum(saved)

    assert saved_elements("rows") - saved_elements("columns") == TOKENS * (IN - RANK)
    assert saved_elements("columns", probe=True) > TOKENS * IN


@pytest.mark.parametrize("side", SIDES)
def test_probes_gather_exact_norms_and_a_sketch_that_adds_up(side):
    layer, x, grad_y = layer_and_data(side)
    weight_grad, _ = dense_gradients(layer, x, grad_y)
    other = 1 - layer.dim

    layer.start_probe(key=5, width=None)
    layer(x).backward(grad_y)
    torch.testing.assert_close(layer.stop_probe(), weight_grad.float().square().sum(dim=other))
    assert layer.probe is None

    def sketch(parts):
        layer.start_probe(key=5, width=4)
        for part in parts:
            layer(x[:, part]).backward(grad_y[:, part])
        return layer.stop_probe()

    whole, parts = sketch([slice(None)]), sketch([slice(0, 3), slice(3, None)])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    assert whole.shape == (layer.selectable, 4)


def test_a_wide_sketch_estimates_the_norms():
    layer, x, grad_y = layer_and_data("rows")
    weight_grad, _ = dense_gradients(layer, x, grad_y)
    layer.start_probe(key=5, width=20_000)
    layer(x).backward(grad_y)
    estimate = layer.stop_probe().norm(dim=1) / 20_000**0.5
    torch.testing.assert_close(estimate, weight_grad.norm(dim=1).float(), rtol=0.03, atol=0)


def test_fp32_rows_of_a_bf16_weight_get_an_fp32_gradient():
    layer, x, grad_y = layer_and_data("rows", dtype=torch.bfloat16, state_dtype=torch.float32)
    layer(x).backward(grad_y)
    assert layer.rows.dtype == layer.rows.grad.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16


def test_compiles_to_one_graph_that_serves_every_index():
    layer, x, grad_y = layer_and_data("rows", dtype=torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for index in ([0, 1, 2], [3, 7, 11]):
        layer.select(torch.tensor(index))
        layer.zero_grad()
        compiled(x).backward(grad_y)
        weight_grad, _ = dense_gradients(layer, x, grad_y)
        torch.testing.assert_close(layer.rows.grad, weight_grad[index])
    assert len(graphs) == 1
