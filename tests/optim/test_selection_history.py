"""The record of a run's selections, against examples worked by hand and the gradient."""

import math

import pytest
import torch
from torch import nn

from models.grass_linear import GrassLinear
from optim.grass import Grass
from optim.selection_history import SelectionHistory
from tests.helpers import PAPER

SCORES = torch.tensor([3.0, 0.0, 4.0, 12.0])  # of norm 13


def note(history, step, index, scores=SCORES):
    history.note("layer", step, torch.tensor(index), scores)
    (layer,) = history.by_layer(since=0 if step == 0 else step - 1).values()
    return layer


def test_each_refresh_records_the_captured_share_new_rows_and_coverage():
    history = SelectionHistory({"layer": 4})
    assert note(history, 0, [0, 2]) == {
        "captured": round(5 / 13, 4), "changed": 2, "selected": 2, "ever_selected": 2, "rows": 4,
    }  # fmt: skip
    assert history.means() == {"grass/captured": 5 / 13, "grass/changed": 1.0, "grass/coverage": 0.5}
    second = note(history, 5, [2, 3])
    assert second["captured"] == round(math.hypot(4, 12) / 13, 4)
    assert (second["changed"], second["ever_selected"]) == (1, 3)
    third = note(history, 10, [0, 2])  # row 0 comes back: a change, and nothing new
    assert (third["changed"], third["ever_selected"]) == (1, 3)


def test_a_row_that_was_drawn_twice_counts_once():
    history = SelectionHistory({"layer": 4})
    layer = note(history, 0, [2, 2, 3])
    assert layer["captured"] == round(math.hypot(4, 12) / 13, 4)
    assert (layer["changed"], layer["selected"], layer["ever_selected"]) == (2, 2, 2)


@pytest.mark.parametrize("scores", [torch.zeros(4), torch.full((4,), float("nan"))])
def test_useless_scores_leave_the_share_unknown(scores):
    history = SelectionHistory({"layer": 4})
    assert note(history, 0, [0, 2], scores)["captured"] is None
    assert history.means().keys() == {"grass/changed", "grass/coverage"}


def test_only_refreshes_after_the_given_step_are_reported():
    history = SelectionHistory({"early": 4, "late": 4})
    assert history.by_layer(since=0) == {}
    for name, step in (("early", 3), ("late", 7)):
        history.note(name, step, torch.tensor([0]), SCORES)
    assert list(history.by_layer(since=2)) == ["early", "late"]
    assert list(history.by_layer(since=3)) == ["late"]
    assert list(history.by_layer(since=7)) == []


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_with_exact_scores_the_share_caught_is_that_of_the_gradient_s_norm(side):
    torch.manual_seed(0)
    layer = GrassLinear(nn.Parameter(torch.randn(8, 10, dtype=torch.float64)), rank=3, side=side)
    weight = layer.weight.detach().clone().requires_grad_()
    model = nn.ModuleDict({"layer": layer})
    x = torch.randn(5, 10, dtype=torch.float64)
    grass = Grass(model, torch.optim.SGD([layer.rows]), **PAPER | {"refresh_every": 10, "score": "exact"})
    grass.start(lambda: layer(x).square().sum().backward())
    (x @ weight.T).square().sum().backward()
    expected = weight.grad.index_select(layer.dim, layer.index).norm() / weight.grad.norm()
    assert grass.history.means()["grass/captured"] == pytest.approx(expected.item(), rel=1e-6)
    assert grass.history.means()["grass/coverage"] == 3 / layer.selectable
