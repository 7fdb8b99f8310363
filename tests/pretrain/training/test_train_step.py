"""A training step by itself: its result, reduced once, and what it tells its observers."""

import math
from dataclasses import dataclass

import pytest
import torch

from pretrain.config.compose import load
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.step_observer import StepObserver
from pretrain.training.train_step import StepResult, TrainStep

ALONE = World(0, 1, torch.device("cpu"))
TINY = [
    "data=text", "data.paths=[.]", "model.vocab_size=40", "model.hidden_size=16", "model.intermediate_size=24",
    "model.num_hidden_layers=1", "model.num_attention_heads=2", "train.seq_len=8", "train.tokens_per_step=32",
    "optim.warmup_steps=0", "train.compile=false",
]  # fmt: skip
GRASS = [
    "optim.rank=4",
    "optim.attention_weight=1",
    "optim.selection=top_r",
    "optim.inner=adamw",
    "optim.refresh_every=2",
]
EVENTS = [name for name in vars(StepObserver) if name.startswith(("before_", "after_"))]


class Noting(StepObserver):
    """Notes the events in their order."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if name in EVENTS:
            return lambda: self.seen.append(name)
        return super().__getattribute__(name)


def step_and_observer(*overrides):
    config, observer = load([*TINY, *overrides]), Noting()
    model = build_model(config, ALONE.device)
    engine = build_engine(config.train, ALONE)
    engine.wrap(model)
    step = TrainStep(config, ALONE, model, engine, build_optimizer(config, model), observers=[observer])
    ids = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(0))
    return step, [(part[:, :-1], part[:, 1:]) for part in ids.chunk(2)], observer


MICRO_BATCH = ["before_forward", "after_forward", "before_backward"]
REFRESH = ["before_refresh", "after_refresh"]


@pytest.mark.parametrize("overrides", [["optim=adamw"], GRASS], ids=["adamw", "grass"])
def test_observers_are_told_every_part_of_a_step_in_order(overrides):
    step, batch, observer = step_and_observer(*overrides)
    for _ in range(2):
        observer.seen.clear()
        step(batch)
        told = [event for event in observer.seen if event not in REFRESH]
        assert told == [*MICRO_BATCH, *MICRO_BATCH, "after_backward", "before_optimizer", "after_optimizer"]
        assert [event for event in observer.seen if event in REFRESH] == (REFRESH if overrides == GRASS else [])
    observer.seen.clear()
    step.accumulate(batch)
    assert observer.seen == [*MICRO_BATCH, *MICRO_BATCH, "after_backward"]


def test_inside_a_backward_the_optimizer_steps_for_each_parameter():
    step, batch, observer = step_and_observer("optim=adamw", "optim.clip=0", "train.step_in_backward=true")
    step(batch)
    parameters = len(step.trainable)
    assert observer.seen.count("before_optimizer") == observer.seen.count("after_optimizer") >= parameters
    assert observer.seen.index("before_optimizer") > observer.seen.index("before_backward")


@dataclass(frozen=True)
class TwoAlike(World):
    """Two processes with the same values; notes what they sum."""

    def sum(self, values):
        self.__dict__.setdefault("sums", []).append(values.tolist())
        return values.mul_(2)


def result(nats=6.0, norm=2.0):
    return StepResult(torch.tensor(nats, dtype=torch.float64), torch.tensor(norm), targets=4)


def test_a_result_is_reduced_once():
    world, step = TwoAlike(0, 2, ALONE.device), result()
    numbers = step.reduce(world)
    assert (numbers.loss, numbers.grad_norm, numbers.finite) == (3.0, 2.0, True)
    assert step.reduce(world) is numbers and len(world.sums) == 1


@pytest.mark.parametrize(("nats", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_numbers_that_are_not_finite_are_noticed(nats, norm):
    assert not result(nats, norm).reduce(ALONE).finite
    assert not bool(result(nats, norm).finite())


def test_an_earlier_failure_counts():
    assert not result().reduce(ALONE, failed_before=torch.tensor(True)).finite
    assert result().reduce(ALONE, failed_before=torch.tensor(False)).finite


def test_a_step_that_leaves_its_batch_out_changes_nothing_and_counts_for_the_refresh():
    step, batch, _ = step_and_observer(*GRASS)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    left_out = step.leave_out()
    assert left_out.skipped and step.optim.grass.steps == 1
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    assert not step(batch).skipped and step.optim.grass.steps == 2
