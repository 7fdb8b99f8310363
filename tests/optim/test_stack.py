"""OptimizerStack: rates, steps and skipped updates of everything that a run attaches to its optimizer."""

import pytest
import torch

from pretrain.config.compose import load
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from tests.optim.test_step_in_backward import TINY

CPU = torch.device("cpu")
GRASS = [
    "optim.rank=4", "optim.attention_weight=1", "optim.selection=top_r", "optim.refresh_every=3", "optim.probe_steps=1",
    "optim.stagger=false",
]  # fmt: skip
MASTERS = ["optim=adamw", "train.dtype=bfloat16", "optim.master_weights=true"]
BFLOAT16_ROWS = ["train.dtype=bfloat16", "optim.state_dtype=bfloat16"]
IDS = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(0))


def built(*overrides):
    config = load([*TINY, *overrides])
    model = build_model(config, CPU)
    stack = build_optimizer(config, model)
    if stack.grass:
        stack.grass.start(lambda: model(IDS, IDS).backward())
    return model, stack


def update(model, stack):
    for last in (False, True):
        with stack.backward(last):
            model(IDS, IDS).backward()
    stack.step()


def test_rates_are_peak_rates_times_the_schedule_and_the_linears_warm_up_after_a_refresh():
    model, stack = built(*GRASS, "optim.refresh_warmup=2", "optim.lr=1e-2", "optim.linear_lr=1e-3", "optim.alpha=1")
    found = []
    for _ in range(4):
        stack.set_rates(0.5)
        found.append(stack.rates())
        update(model, stack)
    assert [rates["linears"] for rates in found] == [0.25e-3, 0.5e-3, 0.5e-3, 0.25e-3]
    assert all(rates["embeddings"] == rates["norms"] == 0.5e-2 for rates in found)


@pytest.mark.parametrize("overrides", [GRASS, MASTERS], ids=["grass", "master weights"])
def test_a_skipped_update_drops_its_gradients_changes_no_weight_and_is_counted(overrides):
    model, stack = built(*overrides)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(IDS, IDS).backward()
    stack.skip()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not stack.optimizer.state
    assert stack.grass is None or stack.grass.steps == 1


@pytest.mark.parametrize(
    "overrides",
    [GRASS, [*GRASS, *BFLOAT16_ROWS], [*GRASS, *BFLOAT16_ROWS, "train.step_in_backward=true"]],
    ids=["one step", "block by block", "in the backward"],
)
def test_refresh_hooks_run_once_around_the_end_of_every_update(overrides):
    model, stack = built(*overrides)
    layers, events = stack.grass.layers.values(), []

    def note(event):
        # Rows are folded before the first hook, so that no update is under way.
        assert all(torch.equal(m.weight.index_select(m.dim, m.index), m.rows) for m in layers)
        events.append((event, stack.grass.steps, any(m.probe is not None for m in layers)))

    stack.grass.register_refresh_pre_hook(lambda: note("before"))
    stack.grass.register_refresh_post_hook(lambda: note("after"))
    for _ in range(3):
        update(model, stack)
    stack.skip()
    assert events == [
        ("before", 0, False), ("after", 1, False), ("before", 1, False), ("after", 2, True), ("before", 2, True),
        ("after", 3, False), ("before", 3, False), ("after", 4, False),
    ]  # fmt: skip


def test_an_exception_in_the_last_backward_ends_no_update():
    model, stack = built(*GRASS, "train.step_in_backward=true")
    with pytest.raises(RuntimeError, match="out of memory"), stack.backward(last=True):
        raise RuntimeError("out of memory")
    assert stack.grass.steps == 0
    update(model, stack)
    assert stack.grass.steps == 1


def test_the_choice_of_rows_can_be_replaced_and_is_still_compared_and_recorded(monkeypatch):
    model, stack = built(*GRASS, "optim.side=auto")  # four rows in every layer
    compared = []
    monkeypatch.setattr("optim.grass.require_agreement", lambda indices, device: compared.append(indices))
    stack.grass.choose = lambda names, norms: [(torch.tensor([1, 2, 3, 5]), None) for _ in names]
    for _ in range(3):
        update(model, stack)
    layers = stack.grass.layers
    assert all(layer.index.tolist() == [1, 2, 3, 5] for layer in layers.values())
    assert {tuple(index.tolist()) for indices in compared for index in indices} == {(1, 2, 3, 5)}
    recorded = stack.grass.history.by_layer(since=0)
    assert recorded.keys() == layers.keys() and all(0 < entry["captured"] < 1 for entry in recorded.values())
