"""A run that does not learn says so once, with the settings to change, and its summary keeps it."""

import json
import math
import random

import pytest

from pretrain.config.compose import load
from pretrain.training.divergence_warning import Divergence, rises
from tests.pretrain.training.test_guards import alerts
from tests.tiny_runs import train


def divergence(*given, logged=()):
    return Divergence(load(["data=text", "data.paths=[.]", "model.vocab_size=400", *given]), logged)


def warnings(judge, losses):
    return [warning for step, loss in enumerate(losses, 1) if (warning := judge.train(step, loss))]


def test_losses_above_those_of_guessing_are_warned_of_once():
    judge = divergence()
    guessing = math.log(400)
    assert warnings(judge, [guessing + 0.03] * 30) == []  # as before training
    assert warnings(judge, [guessing + 0.1] * 9) == []
    (warning,) = warnings(judge, [guessing + 0.1] * 30)
    assert "the last 10 logged losses are above 5.99, the loss of guessing" in warning
    assert "lower optim.linear_lr and optim.lr" in warning and "optim.clip" not in warning
    assert judge.found == warning
    assert judge.validation(1, 99.0) is None  # a second sign


def test_a_loss_that_rises_is_told_from_noise_and_from_a_spike():
    noise = random.Random(0)
    assert rises([3 + 0.02 * i for i in range(20)])
    assert rises([3 + 0.05 * i + noise.gauss(0, 0.1) for i in range(20)])
    assert not rises([3 + 0.005 * i for i in range(20)])  # by 0.1 nats only
    assert not rises([3.0] * 19 + [9.0])
    assert not any(rises([3 + noise.gauss(0, 0.5) for _ in range(20)]) for _ in range(5000))
    falling = [5.5 - 0.01 * i for i in range(100)]
    (warning,) = warnings(
        divergence("optim.clip=0", "optim.warmup_steps=0"), falling + [4.5 + 0.02 * i for i in range(40)]
    )
    assert "the loss has risen for 20 logged steps" in warning
    assert "optim.clip=1" in warning and "optim.warmup_steps=0.1" in warning


@pytest.mark.parametrize(("step", "loss", "warns"), [(0, 6.0, False), (10, 6.04, False), (10, 6.2, True)])
def test_a_validation_loss_above_the_first_is_warned_of(step, loss, warns):
    judge = divergence(logged=[{"step": 0, "val/loss": 6.0}])
    assert bool(judge.validation(step, loss)) == warns
    without = divergence()
    assert without.validation(10, 9.0) is None and without.validation(20, 9.9) is None  # there is no first


def test_a_resumed_run_is_judged_as_if_it_was_never_stopped():
    losses = [9.0] * 3 + [4.0 + 0.02 * i for i in range(40)]
    lines = [{"step": 0, "val/loss": 6.0}, *({"step": n, "train/loss": loss} for n, loss in enumerate(losses, 1))]
    lines.insert(5, {"step": 4, "train/loss": None})  # a skipped step
    complete = divergence(logged=lines)
    assert complete.found is not None
    for stopped in range(0, len(lines), 5):
        judge = divergence(logged=lines[:stopped])
        for line in lines[stopped:]:
            if line.get("train/loss") is not None:
                judge.train(line["step"], line["train/loss"])
            elif "val/loss" in line:
                judge.validation(line["step"], line["val/loss"])
        assert judge.found == complete.found


def test_a_run_that_diverges_has_the_warning_in_its_summary(overrides, caplog):
    wild = ["optim.lr=300", "optim.linear_lr=300", "optim.clip=0", "train.steps=16", "train.eval_every=8"]
    folder, _ = train(overrides(*wild))
    summary = json.loads(folder.summary_file.read_text())
    assert summary["divergence"].startswith("the run diverges: ") and "optim.linear_lr" in summary["divergence"]
    assert caplog.text.count("the run diverges") == 1 and alerts(caplog) == ["The run diverges"]
    assert "but the run diverged, see the warning above" in caplog.text
    assert math.isfinite(summary["val/perplexity"])
    caplog.clear()
    folder, _ = train(overrides(*wild, "train.steps=17"))  # resumed: warned of before, and still in the summary
    assert json.loads(folder.summary_file.read_text())["divergence"] == summary["divergence"]
    assert "the run diverges" not in caplog.text


def test_a_run_that_learns_has_none(overrides, caplog):
    folder, _ = train(overrides("train.steps=24", "train.eval_every=8"))
    assert json.loads(folder.summary_file.read_text())["divergence"] is None
    assert "diverge" not in caplog.text
