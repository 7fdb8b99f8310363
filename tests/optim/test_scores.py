"""The sketch: its error, its sums over micro-batches, processes and steps, and its cost."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from models.convert import convert_linears
from models.grass_linear import GrassLinear
from models.llama import Llama
from optim.grass import Grass
from optim.inner import inner_optimizer
from optim.param_groups import parameter_groups
from optim.selection import SELECTIONS
from tests.helpers import PAPER, Allocations, allocations
from tests.processes import in_processes


def sketch_of(selected, other, key, width):
    """The sketch that backwards make of the gradient ``selectedᵀ @ other``."""
    layer = GrassLinear(nn.Parameter(torch.zeros(selected.shape[1], other.shape[1], dtype=other.dtype)), 1, "rows")
    layer.start_probe(key, width)
    for x, dy in zip(other.split(8), selected.split(8), strict=True):
        layer(x).backward(dy)
    return layer.stop_probe()


def test_the_relative_error_of_the_norms_falls_as_one_over_the_root_of_the_width():
    """For random gradients it is 1/√(2k)."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(64, size, generator=generator, dtype=torch.float64) for size in (256, 96))
    norms = (dy.T @ x).norm(dim=1)
    widths, errors = [4, 16, 64, 256], []
    for width in widths:
        estimates = torch.stack([sketch_of(dy, x, key, width).norm(dim=1) / width**0.5 for key in range(20)])
        errors.append((estimates / norms - 1).square().mean().sqrt())
    log_k, log_error = torch.tensor(widths).log().double(), torch.stack(errors).log()
    slope = torch.linalg.lstsq(torch.stack([log_k, torch.ones(4)], 1), log_error.unsqueeze(1)).solution[0].item()
    assert slope == pytest.approx(-0.5, abs=0.04)
    assert errors[1].item() == pytest.approx(32**-0.5, rel=0.1)


def test_micro_batches_sketched_apart_add_up_exactly():
    """With integers, which float32 adds without rounding."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randint(-3, 4, (16, size), generator=generator).float() for size in (40, 24))
    whole = sketch_of(dy, x, key=5, width=8)
    assert torch.equal(whole, sketch_of(dy[:8], x[:8], 5, 8) + sketch_of(dy[8:], x[8:], 5, 8))
    assert whole.abs().max() > 0


# Choosing the same rows, however the batch is dealt out.

BATCH = 16


def chosen_rows(selection, score, world_size, rank, micro_batches):
    """The rows of three windows: the batch of BATCH dealt to processes and, there, to micro-batches."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 24, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4)
    layers = convert_linears(model, rank=6, patterns=["*"])
    assert {layer.side for layer in layers.values()} == {"rows", "columns"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"selection": selection, "score": score, "probe_steps": 2, "state_at_refresh": "carry"}
    grass = Grass(model, optimizer, refresh_every=3, **PAPER | options)
    parallel = DistributedDataParallel(model) if world_size > 1 else model

    def backward(step):
        data = torch.randn(BATCH, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for part in data.chunk(world_size)[rank].chunk(micro_batches):
            loss = (parallel(part) - part.roll(1, 1)).square().sum() * world_size / BATCH
            loss.backward()

    grass.start(lambda: backward(0))
    chosen = []
    for step in range(7):
        chosen.append([layer.index.tolist() for layer in layers.values()])
        backward(step)
        optimizer.step()
        optimizer.zero_grad()
    return chosen


def _of_two_processes(rank):
    found = {
        (selection, micro): chosen_rows(selection, "sketch", 2, rank, micro)
        for selection in SELECTIONS
        for micro in (1, 4)
    }
    return found | {(selection, "exact"): chosen_rows(selection, "exact", 2, rank, 2) for selection in SELECTIONS}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    first, second = in_processes(2, tmp_path_factory.mktemp("processes"), _of_two_processes)
    assert first == second
    return first


@pytest.mark.parametrize("selection", SELECTIONS)
def test_with_sketch_two_processes_choose_as_one_with_the_full_batch(two_processes, selection):
    expected = chosen_rows(selection, "sketch", 1, 0, 1)
    assert (expected[0] == expected[-1]) == (selection == "frozen")
    assert two_processes[selection, 1] == expected
    assert two_processes[selection, 4] == expected
    assert chosen_rows(selection, "sketch", 1, 0, 4) == expected


@pytest.mark.parametrize("selection", SELECTIONS)
def test_with_exact_processes_choose_as_one_does_at_the_same_micro_batch_size(two_processes, selection):
    assert two_processes[selection, "exact"] == chosen_rows(selection, "exact", 1, 0, 4)
    # Squared norms of parts do not add up to those of the whole; uniform samples and turns do not look at them.
    differs = two_processes[selection, "exact"] != chosen_rows(selection, "exact", 1, 0, 1)
    assert differs != selection.startswith(("uniform", "cyclic"))


# What it costs.


def test_a_probed_step_takes_at_most_a_tenth_more_flops_at_60m():
    with torch.device("meta"):
        model = Llama(
            vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            max_position_embeddings=1024,
        )  # fmt: skip
        ids = torch.zeros(2, 256, dtype=torch.int64)
        layers = convert_linears(model, rank=128)

    def step_flops(probed, width=None):
        for layer in layers.values() if probed else ():
            layer.start_probe(key=1, width=width)
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).backward()
        for layer in layers.values() if probed else ():
            layer.stop_probe()
        return counter.get_total_flops()

    regular = step_flops(probed=False)
    tokens = ids.numel()
    extra = sum(2 * tokens * 16 * (layer.in_features + layer.out_features) for layer in layers.values())
    assert step_flops(True, 16) == regular + extra
    assert 1 < step_flops(True, 32) / regular <= 1.10
    dense = sum(2 * tokens * layer.weight.numel() for layer in layers.values())
    assert step_flops(True) == regular + dense  # exact: a weight gradient each


def test_exact_holds_the_full_gradient_of_one_layer_at_a_time():
    """Three layers whose gradients are large beside all else: the peak rises by one of them, the sketch's by none."""
    size, full = 256, 256 * 256 * 4
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(3)))
    layers = convert_linears(model, rank=8, patterns=["*"])
    x = torch.randn(4, size)

    def peak(probed, width=None):
        for layer in layers.values() if probed else ():
            layer.start_probe(key=1, width=width)
        most, _ = allocations(lambda: model(x).sum().backward())
        for layer in layers.values() if probed else ():
            layer.stop_probe()
        model.zero_grad()
        return most

    peak(False)
    regular = peak(False)
    assert regular < full / 4
    assert full <= peak(True) - regular < 1.25 * full
    assert peak(True, width=4) - regular < full / 4


@pytest.mark.parametrize("inner", ["adamw", "muon"])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_neither_start_nor_refresh_with_sketch_makes_a_tensor_of_a_full_gradient_s_shape(side, inner):
    def shapes_of_a_refresh_step(score):
        model = Llama(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16,
        )  # fmt: skip
        model.init_weights(seed=0)
        layers = convert_linears(model, rank=4, side=side)
        optimizer = inner_optimizer(inner, parameter_groups(model, lr=1e-3, linear_lr=1e-3, weight_decay=0.1))
        grass = Grass(
            model,
            optimizer,
            **PAPER | {"refresh_every": 2, "score": score, "sketch_width": 3, "state_at_refresh": "carry"},
        )
        ids = torch.zeros(3, 7, dtype=torch.int64)
        with Allocations() as allocations:
            grass.start(lambda: model(ids, ids).backward())
            for _ in range(2):
                model(ids, ids).backward()
                optimizer.step()
                model.zero_grad()
        return allocations.shapes, {
            tuple(s) for layer in layers.values() for s in (layer.weight.shape, layer.weight.mT.shape)
        }

    shapes, full = shapes_of_a_refresh_step("sketch")
    assert full == {(16, 16), (16, 24), (24, 16)}
    assert not shapes & full
    shapes, _ = shapes_of_a_refresh_step("exact")
    assert shapes & full  # the detector does detect
