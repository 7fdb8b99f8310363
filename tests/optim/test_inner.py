"""Every inner optimizer under Grass against the same optimizer on the selected rows, and on the dense model."""

import sys

import pytest
import torch
from torch import nn

from models.convert import convert_linears
from models.grass_linear import GrassLinear
from optim import muon, normuon
from optim.grass import Grass
from optim.inner import inner_optimizer, optimizer_class, optimizer_of_groups
from optim.param_groups import parameter_groups, set_rates
from tests.helpers import PAPER

# The optimizer by name, and its class as anyone would call it with lr, weight_decay and what is given here.
INNER = {
    "muon": lambda p, **kw: muon.Muon(p, momentum=0.8, **kw),  # tests/test_baselines.py holds it against torch's
    "normuon": lambda p, **kw: normuon.NorMuon(p, momentum=0.8, **kw),  # held against others in test_normuon.py
    "adamw": lambda p, **kw: torch.optim.AdamW(p, betas=(0.9, 0.99), eps=1e-8, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, betas=(0.9, 0.99), eps=1e-8, **kw),
    "sgd": lambda p, **kw: torch.optim.SGD(p, momentum=0.8, **kw),
    "adafactor": lambda p, **kw: torch.optim.Adafactor(p, **kw),
    "torch.optim.NAdam": lambda p, **kw: torch.optim.NAdam(p, betas=(0.9, 0.99), eps=1e-8, **kw),
    "torch.optim.RMSprop": lambda p, **kw: torch.optim.RMSprop(p, eps=1e-8, momentum=0.8, **kw),
}
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8, "momentum": 0.8}
LR, DECAY = 0.02, 0.1


def model_of(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Tanh(), nn.Linear(6, 10, bias=False)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    return model


def grass_of(name, rank, **kwargs):
    model = model_of()
    layers = convert_linears(model, rank, patterns=["*"])
    groups = parameter_groups(model, lr=LR, linear_lr=LR, weight_decay=DECAY)
    optimizer = inner_optimizer(name, groups, **OPTIONS)
    grass = Grass(model, optimizer, **PAPER | {"refresh_every": 1000} | kwargs)
    grass.start(lambda: backward(model, 0))
    return model, layers, optimizer


def backward(model, step):
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    loss = (model(x) - x.flip(1)).square().mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("name", INNER)
def test_the_step_on_the_rows_is_that_of_the_optimizer_on_the_rows_as_parameters(name):
    """Weight decay and, for Adafactor, the scaling by the parameter's size included."""
    model, layers, optimizer = grass_of(name, rank=3)
    alone = [nn.Parameter(layer.rows.detach().clone()) for layer in layers.values()]
    reference = INNER[name](alone, lr=LR, weight_decay=DECAY)
    for step in range(6):
        backward(model, step)
        for parameter, layer in zip(alone, layers.values(), strict=True):
            parameter.grad = layer.rows.grad.clone()
        optimizer.step()
        reference.step()
        model.zero_grad()
        for parameter, layer in zip(alone, layers.values(), strict=True):
            torch.testing.assert_close(layer.rows, parameter, rtol=1e-12, atol=1e-12)
            assert torch.equal(layer.weight.index_select(layer.dim, layer.index), layer.rows)


@pytest.mark.parametrize("name", INNER)
def test_with_every_row_selected_it_is_the_dense_optimizer(name):
    model, layers, optimizer = grass_of(name, rank=6)
    dense = model_of()
    reference = INNER[name](dense.parameters(), lr=LR, weight_decay=DECAY)
    for step in range(10):
        loss = backward(model, step)
        assert loss == pytest.approx(backward(dense, step), rel=1e-10)
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    assert loss < backward(model_of(), 9)
    for layer, weight in zip(layers.values(), dense.parameters(), strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("refresh", ["reset", "carry"])
@pytest.mark.parametrize("name", INNER)
def test_it_trains_through_refreshes_in_turn(name, refresh):
    model, _, optimizer = grass_of(name, rank=3, refresh_every=4, stagger=True, state_at_refresh=refresh)
    losses = []
    for step in range(40):
        losses.append(backward(model, step % 4))
        optimizer.step()
        model.zero_grad()
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "normuon", "torch.optim.Muon"])
def test_decoupled_decay_is_taken_once_whatever_rho_is(name):
    """With no gradient there is no step but decay: w ← (1 - lr·decay) w, also where ρ ≠ 1 and rows repeat."""
    layer = GrassLinear(nn.Parameter(torch.randn(4, 6)), rank=3)
    model = nn.ModuleDict({"layer": layer})
    optimizer = inner_optimizer(name, parameter_groups(model, lr=LR, linear_lr=LR, weight_decay=DECAY))
    Grass(model, optimizer, **PAPER | {"refresh_every": 1000, "selection": "uniform_with_replacement"})
    layer.select(torch.tensor([1, 1, 3]), torch.tensor([3.0, 3.0, 0.5]))
    expected = layer.weight.detach().clone()
    expected[[1, 3]] *= 1 - LR * DECAY
    layer.rows.grad = torch.zeros_like(layer.rows)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_decay_in_the_gradient_is_part_of_the_step_and_counts_rho_times():
    layer = GrassLinear(nn.Parameter(torch.randn(4, 6)), rank=2)
    model = nn.ModuleDict({"layer": layer})
    optimizer = inner_optimizer("sgd", parameter_groups(model, lr=LR, linear_lr=LR, weight_decay=DECAY))
    Grass(model, optimizer, **PAPER | {"refresh_every": 1000, "selection": "uniform_with_replacement"})
    layer.select(torch.tensor([1, 3]), torch.tensor([3.0, 0.5]))
    expected = layer.weight.detach().clone()
    expected[1] *= 1 - 3.0 * LR * DECAY
    expected[3] *= 1 - 0.5 * LR * DECAY
    layer.rows.grad = torch.zeros_like(layer.rows)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_8_bit_adamw_steps_on_the_rows_as_parameters_and_has_quantised_moments():
    weight = torch.randn(64, 256)
    layer = GrassLinear(nn.Parameter(weight.clone()), rank=32)
    model = nn.ModuleDict({"layer": layer})
    groups = parameter_groups(model, lr=LR, linear_lr=LR, weight_decay=DECAY)
    optimizer = inner_optimizer("adamw8bit", groups, betas=(0.9, 0.99))
    Grass(model, optimizer, refresh_every=1000, **PAPER)
    layer.select(torch.arange(0, 64, 2))
    alone = nn.Parameter(weight[::2].clone())
    reference = optimizer_class("adamw8bit")([alone], lr=LR, betas=(0.9, 0.99), weight_decay=DECAY)
    for step in range(4):
        set_rates(optimizer, 1.0)
        alone.grad = torch.randn(alone.shape, generator=torch.Generator().manual_seed(step))
        layer.rows.grad = alone.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(layer.rows, alone)
    assert torch.equal(layer.weight[::2], alone) and torch.equal(layer.weight[1::2], weight[1::2])
    assert optimizer.state[layer.rows]["exp_avg"].codes.dtype == torch.uint8


def test_8_bit_adamw_without_torchao_names_the_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"adamw8bit: .*torchao.*\.venv/bin/pip install -r requirements-extra\.txt"):
        optimizer_class("adamw8bit")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamax", r"optim\.inner=adamax is unknown; choose from adamw, adam, sgd, adafactor, adamw8bit, .* or give"),
        ("torch.optmi.AdamW", r"optim\.inner=torch\.optmi\.AdamW: cannot import torch\.optmi"),
        ("torch.optim.Madam", r"torch\.optim\.Madam is not a torch\.optim\.Optimizer"),
        ("torch.nn.Linear", r"torch\.nn\.Linear is not a torch\.optim\.Optimizer"),
        ("torch.optim.adamw", r"torch\.optim\.adamw is not a torch\.optim\.Optimizer"),
    ],
)
def test_a_name_of_no_optimizer_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class(name)


def test_weight_decay_for_an_optimizer_that_has_none_is_refused():
    groups = parameter_groups(model_of(), lr=LR, linear_lr=LR, weight_decay=DECAY)
    with pytest.raises(ValueError, match=r"optim\.weight_decay: Rprop .* has none; set it to 0"):
        inner_optimizer("torch.optim.Rprop", groups)


def test_the_options_of_an_optimizer_are_logged(caplog):
    groups = parameter_groups(model_of(), lr=LR, linear_lr=LR)
    with caplog.at_level("INFO"):
        inner_optimizer("sgd", groups, **OPTIONS)
    assert "SGD with momentum=0.8" in caplog.text


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 256)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(256, 32, bias=False)})


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor"])
def test_embeddings_can_have_an_optimizer_of_their_own(name):
    model, reference = (nn.ModuleDict({"model": Headed()}) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    groups = parameter_groups(model, lr=LR, linear_lr=LR, weight_decay=DECAY)
    optimizer = optimizer_of_groups("adamw", name, groups, **OPTIONS)
    alone = [
        inner_optimizer(inner, [{"params": list(part.parameters()), "lr": LR, "weight_decay": DECAY}], **OPTIONS)
        for inner, part in ((name, reference["model"].embed_tokens), ("adamw", reference["model"].mlp))
    ]
    for step in range(3):
        for one in (model, reference):
            for p in one.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        for stepping in (optimizer, *alone):
            stepping.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    moments = optimizer.state[model["model"].embed_tokens.weight]
    assert "exp_avg" not in moments if name == "adafactor" else moments["exp_avg"].codes.dtype == torch.uint8


def test_another_optimizer_for_the_embeddings_keeps_its_state_where_muon_keeps_its_own():
    layers = nn.ModuleDict({name: nn.Linear(4, 6, bias=False) for name in ("q_proj", "embed_tokens")})
    groups = parameter_groups(layers, lr=LR, linear_lr=LR, patterns=["*_proj"])
    optimizer = optimizer_of_groups("muon", "adafactor", groups, **OPTIONS)
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[layers["q_proj"].weight]
    assert "row_var" in optimizer.state[layers["embed_tokens"].weight]
