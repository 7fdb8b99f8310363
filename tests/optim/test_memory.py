"""The formula of the memory that is held throughout a step, against the tensors themselves."""

import pytest
import torch

from optim.memory import held_bytes
from tests.optim.test_stack import BFLOAT16_ROWS, GRASS, MASTERS, built, update

INNER = ["adamw", "adam", "sgd", "muon", "normuon", "adafactor"]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    "overrides",
    [
        *([*GRASS, f"optim.inner={name}"] for name in INNER),
        [*GRASS, *BFLOAT16_ROWS],
        [*GRASS, "optim.int8_weights=true"],
        [*GRASS, "optim.inner=adamw", "optim.embedding_inner=adafactor", "train.step_in_backward=true"],
        MASTERS,
    ],
    ids=[*INNER, "bfloat16 rows", "8-bit weights", "step in backward", "master weights"],
)
def test_it_is_that_of_the_tensors_after_a_step(overrides):
    model, stack = built(*overrides)
    found = held_bytes(model, stack)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    gradients = size(p.grad for p in model.parameters() if p.grad is not None)
    stack.skip()
    update(model, stack)
    states = stack.optimizer.state.values()
    masters = [m for _, m in stack.masters.pairs] if stack.masters else []
    assert found == {
        "weights": size([*model.parameters(), *model.buffers(), *masters]),
        "gradients": 0 if stack.steps_in_backward else gradients,
        "optimizer state": size(t for state in states for name, t in state.items() if name != "step"),
    }
    assert found["weights"] and found["optimizer state"]


def test_an_optimizer_without_a_formula_has_no_number():
    model, stack = built(*GRASS, "optim.inner=torch.optim.NAdam")
    assert held_bytes(model, stack)["optimizer state"] is None
