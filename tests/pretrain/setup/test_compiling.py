"""The block that is compiled first, for a trial: what serves the run afterwards, and what becomes of a failure."""

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.steps import Steps
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.setup import compiling
from pretrain.setup.compiling import compile_blocks
from tests.tiny_runs import train

TINY = [
    "model.hidden_size=64", "model.intermediate_size=160", "model.num_attention_heads=2", "model.vocab_size=32",
    "train.seq_len=16", "train.tokens_per_step=32", "optim.rank=8", "logger.wandb.mode=disabled",
]  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("more", "graphs"),  # with probes, and without
    [
        (["optim.selection=top_r"], 2),
        (["optim.selection=cyclic"], 1),
        (["optim=adamw"], 1),
        (["optim.selection=multinomial_norm_with_replacement", "optim.inner=adamw"], 2),
        (["optim.selection=top_r", "train.checkpointing=full", "train.dtype=bfloat16"], 2),
    ],
)
def test_what_is_compiled_for_the_trial_is_all_that_a_run_needs(more, graphs):
    torch._dynamo.reset()
    counters.clear()
    own = [o for o in TINY if "rank" not in o or "optim=adamw" not in more]
    steps = Steps(load([*own, *more]), ALONE)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled == graphs
    made = iter(steps)
    for _ in range(11):
        next(made)
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_block_that_does_not_compile_is_said_and_the_model_trains_as_it_is(caplog, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("\nScalar -7046029254386353131 is out of range\nmore")

    monkeypatch.setattr(compiling.GrassLinear, "start_probe", refuse)  # the state that a small trial does not have
    config = load([*TINY, "train.compile=false", "optim.selection=top_r"])
    steps = Steps(config, ALONE)
    caplog.set_level("INFO")
    caplog.clear()
    assert not compile_blocks(config, steps.model, ALONE)
    assert caplog.messages[0] == "compiling …"  # while it lasts, which may be a minute
    assert "on this machine (RuntimeError: Scalar -7046029254386353131 is out of range" in caplog.text
    assert all(layer._compiled_call_impl is None for layer in steps.model.layers)


def test_seconds_of_compiling_are_logged_when_steps_add_to_them(overrides, caplog, monkeypatch):
    before, after = 30.0, 45.0  # those before the first step have been logged as "compiled in 30 s"
    taken = iter([before, before, after, after, after])  # at the start, after each of three steps, in the summary
    monkeypatch.setattr("pretrain.training.step_log.compile_seconds", lambda: next(taken))
    train(overrides("train.steps=3"))
    lines = [line for line in caplog.messages if "compiling has taken" in line]
    assert lines == ["step 2: compiling has taken 45 s so far"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "backend='inductor' raised:\nOSError: [Errno 28] No space left on device",
            "OSError: [Errno 28] No space left",
        ),
        (
            "backend='inductor' raised:\n\nPermissionError: [Errno 13] denied: '/x'",
            "PermissionError: [Errno 13] denied",
        ),
        (
            "C++ compile error\n\nOutput:\nx.h:3:1: warning: w\nx.h:9:2: fatal error: No space left",
            "(x.h:9:2: fatal error",
        ),
        ("C++ compile error\n\nOutput:\nx.cpp:1:1: error: no <omp.h>\nmore", "C++ compile error (x.cpp:1:1: error: no"),
        ("\n\nFileNotFoundError: g++", "FileNotFoundError: g++"),
        ("backend='inductor' raised:", "RuntimeError: no reason is given"),
        ("", "RuntimeError: no reason is given"),
    ],
)
def test_the_reason_of_a_failure_is_in_its_one_line(text, reason):
    line = compiling.failure(RuntimeError(text))
    assert reason in line and "\n" not in line and "raised:" not in line
