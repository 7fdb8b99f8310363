"""The optimizer's state at a refresh, against examples worked by hand."""

import logging

import pytest
import torch
from torch import nn

from models.grass_linear import GrassLinear
from models.row_updates import Change
from optim.grass import Grass
from optim.inner import optimizer_class
from optim.moments import carry
from tests.helpers import PAPER

# A (4, 2) weight, rows 0 and 1 selected; its gradient's squared row norms make the next selection rows 1 and 3.
WEIGHT = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
SQUARED_NORMS = [0.0, 9.0, 1.0, 16.0]
FIRST = [[1.0, 2.0], [3.0, 4.0]]
SECOND = [[1.0, 4.0], [9.0, 16.0]]
# The second moment of new row 3: the mean of the rows selected before it; 16 over 2 elements; nothing.
NEW_SECOND = {"mean": [5.0, 10.0], "score": [8.0, 8.0], "zero": [0.0, 0.0]}


def refreshed(side, optimizer_class, state=None, fixed=None, **kwargs):
    """The layer and its optimizer after a refresh from rows (0, 1) to (1, 3), with ``state`` before it.

    ``fixed`` is state that is laid out alike for both sides.
    """

    def lay(matrix):  # a row selection's example, turned for columns
        return torch.tensor(matrix) if side == "rows" else torch.tensor(matrix).T.contiguous()

    layer = GrassLinear(nn.Parameter(lay(WEIGHT)), rank=2, side=side)
    optimizer = optimizer_class([layer.rows], lr=0.1)
    grass = Grass(nn.ModuleDict({"layer": layer}), optimizer, **PAPER | {"refresh_every": 3} | kwargs)
    if state:
        optimizer.state[layer.rows] = {k: torch.tensor(7.0) if v is None else lay(v) for k, v in state.items()}
        optimizer.state[layer.rows] |= {k: torch.tensor(v) for k, v in (fixed or {}).items()}
    grass.probes.gathered = {"layer": torch.tensor(SQUARED_NORMS)}
    grass._refresh(["layer"])
    assert layer.index.tolist() == [1, 3]
    assert torch.equal(layer.rows.detach(), lay(WEIGHT[1::2]))
    return layer, optimizer, lay


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("new_second_moment", NEW_SECOND)
def test_carry_keeps_the_moments_of_rows_that_stay_and_starts_new_rows_as_named(side, new_second_moment):
    layer, optimizer, lay = refreshed(
        side,
        torch.optim.AdamW,
        {"step": None, "exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND},
        state_at_refresh="carry",
        new_second_moment=new_second_moment,
    )
    state = optimizer.state[layer.rows]
    assert state["step"] == 7  # one count for the matrix: it runs on for rows of every age
    assert torch.equal(state["exp_avg"], lay([[3.0, 4.0], [0.0, 0.0]]))
    second = lay([[9.0, 16.0], NEW_SECOND[new_second_moment]])
    assert torch.equal(state["exp_avg_sq"], second)
    assert torch.equal(state["max_exp_avg_sq"], second)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("new_second_moment", NEW_SECOND)
def test_normuon_s_mean_squares_move_with_rows_and_new_rows_start_at_their_mean(side, new_second_moment):
    """Of the columns' example, the outputs are 0 and 1 before and after: the state has a number for each."""
    layer, optimizer, lay = refreshed(
        side,
        optimizer_class("optim.normuon.NorMuon"),
        {"momentum_buffer": FIRST},
        {"row_mean_square": [[2.0], [8.0]]},
        state_at_refresh="carry",
        new_second_moment=new_second_moment,
    )
    state = optimizer.state[layer.rows]
    assert torch.equal(state["momentum_buffer"], lay([[3.0, 4.0], [0.0, 0.0]]))
    expected = {"rows": [[8.0], [5.0]], "columns": [[2.0], [8.0]]}
    assert torch.equal(state["row_mean_square"], torch.tensor(expected[side]))


@pytest.mark.parametrize("dim", [0, 1])
def test_rho_and_scores_are_not_for_normuon_s_mean_squares(dim):
    state = {"row_mean_square": torch.tensor([[2.0], [8.0], [5.0]])}
    change = Change(
        torch.tensor([[0, 1, 2]]), torch.tensor([[1, 3, 3]]), torch.tensor([[1.0, 2, 2]]),
        torch.tensor([[4.0, 4, 4]]), dim,
    )  # fmt: skip
    carry([state], change, "score", score=torch.tensor([[0.0, 3.0, 3.0]]))
    assert torch.equal(state["row_mean_square"], torch.tensor([[[8.0], [5.0], [5.0]], [[2.0], [8.0], [5.0]]][dim]))


def test_normuon_s_state_does_not_make_layers_be_probed():
    layer = GrassLinear(nn.Parameter(torch.randn(8, 6)), rank=2)
    optimizer = optimizer_class("optim.normuon.NorMuon")([layer.rows])
    grass = Grass(
        nn.ModuleDict({"layer": layer}),
        optimizer,
        **PAPER
        | {"state_at_refresh": "carry", "new_second_moment": "score", "selection": "uniform", "refresh_every": 5},
    )
    for _ in range(30):
        layer.rows.grad = torch.randn_like(layer.rows)
        optimizer.step()
        assert layer.probe is None
    assert optimizer.state[layer.rows].keys() == {"momentum_buffer", "row_mean_square"}
    assert not grass._state.uses_scores([layer.rows])


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("name", ["optim.muon.Muon", "sgd"])
def test_the_momentum_of_muon_and_sgd_is_carried_as_a_first_moment(name, side):
    before = {"momentum_buffer": FIRST}
    layer, optimizer, lay = refreshed(side, optimizer_class(name), before, state_at_refresh="carry")
    assert optimizer.state[layer.rows].keys() == before.keys()
    assert torch.equal(optimizer.state[layer.rows]["momentum_buffer"], lay([[3.0, 4.0], [0.0, 0.0]]))


def test_the_moments_of_other_torch_optimizers_are_carried_by_their_kind():
    names = {"exp_avg": FIRST, "exp_inf": FIRST, "grad_avg": FIRST, "square_avg": SECOND, "sum": SECOND}
    layer, optimizer, lay = refreshed("rows", torch.optim.AdamW, {"step": None, **names}, state_at_refresh="carry")
    new = {name: [0.0, 0.0] if before is FIRST else NEW_SECOND["mean"] for name, before in names.items()}
    for name, before in names.items():
        assert torch.equal(optimizer.state[layer.rows][name], lay([before[1], new[name]])), name


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("policy", "new_second"), [("mean", [[48.0, 80.0]]), ("score", [[48.0, 48.0]])])
def test_moments_follow_a_changing_rho(dim, policy, new_second):
    """Row 1 goes from ρ = 2 to 4: m doubles, v quadruples. Row 3 comes with ρ = 4, drawn twice."""

    def lay(matrix):
        return torch.tensor(matrix) if dim == 0 else torch.tensor(matrix).T.contiguous()

    state = {"step": torch.tensor(7.0), "exp_avg": lay([*FIRST, [0, 0]]), "exp_avg_sq": lay([*SECOND, [23, 28]])}
    change = Change(
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[1, 3, 3]]),
        torch.tensor([[1.0, 2, 2]]),
        torch.tensor([[4.0, 4, 4]]),
        dim,
    )
    # Second moments of G itself: [1, 4], [9, 16] / 4, [23, 28] / 4; their mean is [3, 5].
    carry([state], change, policy, score=torch.tensor([[0.0, 3.0, 3.0]]))
    assert torch.equal(state["exp_avg"], lay([[6.0, 8.0], [0.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(state["exp_avg_sq"], lay([[36.0, 64.0], *new_second, *new_second]))
    assert state["step"] == 7


def test_a_new_row_s_first_steps_under_carry_grow_as_its_first_moment_does():
    """With m = 0, v = g² and a long count, the t-th step of a constant gradient is lr (1 - β₁ᵗ)."""
    rows = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))
    adam = torch.optim.Adam([rows], lr=1.0, eps=0.0)
    moments = {"exp_avg": torch.zeros_like(rows), "exp_avg_sq": torch.full_like(rows, 4.0)}
    adam.state[rows] = {"step": torch.tensor(1e6), **moments}
    position = 0.0
    for t in range(1, 6):
        rows.grad = torch.full_like(rows, -2.0)
        adam.step()
        position += 1 - 0.9**t
        torch.testing.assert_close(rows.detach(), torch.full_like(rows, position).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_reset_equals_a_fresh_optimizer(side):
    state = {"step": None, "exp_avg": FIRST, "exp_avg_sq": SECOND}
    layer, optimizer, _ = refreshed(side, torch.optim.AdamW, state, state_at_refresh="reset")
    assert not optimizer.state
    fresh = nn.Parameter(layer.rows.detach().clone())
    adamw = torch.optim.AdamW([fresh], lr=0.1)
    for step in range(2):
        fresh.grad = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(step))
        layer.rows.grad = fresh.grad.clone()
        adamw.step()
        optimizer.step()
        assert torch.equal(layer.rows, fresh)
    assert torch.equal(layer.weight.index_select(layer.dim, layer.index), fresh)


# Factored moments, moments quantised in blocks of 256 elements, and step sizes, which are no moments.
NOT_CARRIED = {
    "adafactor": "Adafactor: its state (step, row_var, col_var)",
    "adamw8bit": "AdamW8bit: its state (step, exp_avg, exp_avg_sq)",
    "torch.optim.Rprop": "Rprop: its state (step, prev, step_size)",
}


@pytest.mark.parametrize("name", NOT_CARRIED)
def test_state_that_cannot_be_carried_is_reset_with_one_warning(name, caplog):
    layer = GrassLinear(nn.Parameter(torch.randn(64, 256)), rank=32)
    optimizer = optimizer_class(name)([layer.rows])
    grass = Grass(
        nn.ModuleDict({"layer": layer}), optimizer, **PAPER | {"refresh_every": 2, "state_at_refresh": "carry"}
    )
    with caplog.at_level(logging.WARNING):
        for step in range(1, 7):
            layer.rows.grad = torch.randn_like(layer.rows)
            grass.probes.gathered = {"layer": torch.rand(64)}
            optimizer.step()
            assert (layer.rows in optimizer.state) == (step % 2 == 1)
    said = [record.message for record in caplog.records if "carry has no effect" in record.message]
    assert said == [
        f"optim.state_at_refresh=carry has no effect with {NOT_CARRIED[name]} has values that belong to more than one "
        "element or row and cannot be carried, so every refresh resets it"
    ]
