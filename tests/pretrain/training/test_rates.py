"""A resume that changes the learning rates says how, with numbers, before the first step."""

import json
import logging

import pytest

from pretrain.config.compose import load
from pretrain.training.rates import describe_change, rate_settings, schedule_factor
from tests.tiny_runs import train

COSINE = ["optim.lr=0.02", "optim.linear_lr=0.002", "optim.alpha=1", "optim.final_lr=0.1", "optim.warmup_steps=4"]
WSD = [*COSINE, "optim.schedule=wsd", "optim.decay_share=0.25"]


def settings(*given):
    return load(["data=text", "data.paths=[.]", "train.steps=20", *COSINE, *given])


# settings before, settings now, steps made → words of the lines, in order; none where the course stays the same
CHANGES = {
    "finished cosine": ([], ["train.steps=40"], 20, ["0.0002 so far, 0.001", "0.002 so far, 0.01", "times"]),
    "unfinished cosine": ([], ["train.steps=40"], 10, ["(planned: 0.00138)", "(planned: 0.0138)", "times"]),
    "finished wsd": (WSD, [*WSD, "train.steps=40"], 20, ["0.0002 so far, 0.002 at step 21", "far, 0.02", "times"]),
    "wsd before its decay": (WSD, [*WSD, "train.steps=40"], 8, ["0.002 at step 9 (planned: 0.002)", "0.02"]),
    "another peak": ([], ["optim.lr=0.04"], 10, ["of the other parameters: 0.0155 so far, 0.0276"]),
    "rate of linear layers": ([], ["optim.linear_lr=0.001"], 10, ["of the linear layers: 0.00155 so far, 0.000689"]),
    "alpha": ([], ["optim.alpha=2"], 10, ["of the linear layers: 0.00155 so far, 0.00276"]),
    "another schedule": (
        [],
        ["optim.schedule=constant"],
        10,
        ["far, 0.002 at step 11 (planned:", "far, 0.02", "times"],
    ),
    "another end": ([], ["optim.final_lr=0"], 19, ["far, 0 at step 20 (planned: 0.0002)", "far, 0 at step 20"]),
    "a shorter run": ([], ["train.steps=12"], 10, ["0.0002 at step 12 (planned:", "0.002 at step 12"]),
    "a warm-up that is longer": ([], ["optim.warmup_steps=8"], 2, ["0.00075 at step 3 (planned: 0.0015)", "0.0075"]),
    "shorter than it is": ([], ["train.steps=12"], 15, ["at step 15, but train.steps=12: no step is left"]),
    "a longer constant run": (["optim.schedule=constant"], ["optim.schedule=constant", "train.steps=40"], 20, []),
    "nothing": ([], [], 10, []),
    "no rate": ([], ["train.log_every=3", "optim.clip=0.5"], 10, []),
    "the end": ([], [], 20, []),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_rates_is_described_with_numbers(change):
    before, now, step, words = change
    lines = describe_change(json.loads(json.dumps(rate_settings(settings(*before)))), settings(*now), step)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True)), lines


def test_an_older_checkpoint_without_the_settings_of_its_rates_says_nothing():
    assert describe_change(None, settings("train.steps=40"), 20) == []
    assert describe_change({}, settings("train.steps=40"), 20) == []


def test_the_numbers_are_those_of_the_steps(overrides, caplog):
    """What was said before the first step is what the metric lines have."""
    rates = ["optim.lr=0.02", "optim.linear_lr=0.002", "train.sample_tokens=0"]
    folder, _ = train(overrides(*rates, "train.steps=8"))
    with caplog.at_level(logging.WARNING):
        train(overrides(*rates, "train.steps=12"))
    lines = map(json.loads, folder.metrics_file.read_text().splitlines())
    logged = {line["step"]: line["train/lr_linears"] for line in lines if "train/lr" in line}
    last, first = logged[8], logged[9]
    assert first == 0.002 * schedule_factor(load(overrides(*rates, "train.steps=12")), 8)
    assert f"the learning rate of the linear layers: {last:.3g} so far, {first:.3g} at step 9" in caplog.text
    assert "optim.schedule=wsd" in caplog.text and "optim.schedule=wsd" in folder.log_file.read_text()
