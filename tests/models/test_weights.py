"""Weights that do not fit a model: the message names the weight, what is wrong with it, and the fix."""

import pytest
import torch
from torch import nn

from models.weights import fill_weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"b.weight": (3, 2)}, "train.init_from=x: b.weight does not exist in the model; check model.*"),
        ({"a": (3, 2)}, "train.init_from=x: a.weight has shape (3, 2), but the model expects (2, 3); check model.*"),
        ({}, "train.init_from=x lacks a.weight, c.weight, d.weight, e.weight and 1 more; check model.*"),
        (dict.fromkeys("acd", (2, 3)), "train.init_from=x lacks e.weight, f.weight; check model.*"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(weights, message):
    model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in "acdef"})
    named = [(name if "." in name else f"{name}.weight", torch.zeros(shape)) for name, shape in weights.items()]
    with pytest.raises(ValueError) as error:
        fill_weights(model, named, "train.init_from=x")
    assert str(error.value) == message
