"""Complete runs of a tiny model: what they leave, and what stops them."""

import gzip
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from pretrain.checkpoint.directory import latest
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer
from tests.tiny_runs import ALONE, losses, run_cli, selections, train

LOGGED = [
    "step", "tokens", "train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/step_s", "perf/data_s",
    "perf/tflops", "mem/peak_bytes",
]  # fmt: skip


def test_a_run_leaves_what_it_promises(overrides):
    folder, _ = train(overrides("train.eval_every=4", "train.checkpoint_every=4"))
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    training, validation = [x for x in lines if "train/loss" in x], [x for x in lines if "val/loss" in x]
    assert [x["step"] for x in training] == list(range(1, 9))
    assert [x["step"] for x in validation] == [0, 4, 8]
    assert abs(validation[0]["val/loss"] - math.log(400)) < 0.05  # before training every token is as likely
    for name in LOGGED:
        assert all(isinstance(x[name], int | float) for x in training)
    assert training[-1]["tokens"] == 8 * 256
    assert {"val/loss", "val/perplexity", "val/bits_per_byte"} <= validation[0].keys()
    assert losses(folder)[8] < losses(folder)[1]
    summary = json.loads(folder.summary_file.read_text())
    assert summary["val/loss"] == validation[-1]["val/loss"] < validation[0]["val/loss"]
    assert summary["tokens"] == 2048 and summary["versions"]["torch"] == torch.__version__
    assert summary["trainable"] < summary["parameters"]
    assert folder.samples_file.read_text().count("````text") == 3
    assert [p.name for p in sorted(folder.checkpoints.iterdir())] == ["latest", "step-00000004", "step-00000008"]
    assert "step 8 · loss" in folder.log_file.read_text()


def test_a_run_shows_what_its_selections_catch_change_and_cover(overrides):
    folder, trainer = train(overrides("train.log_every=4", "train.steps=11", "optim.refresh_every=3"))
    means, lines = selections(folder)
    assert len(means) == 3 and all(0 < line[f"grass/{n}"] <= 1 for line in means for n in ("captured", "coverage"))
    assert means[0]["grass/coverage"] < means[-1]["grass/coverage"]
    # Refreshes after updates 0, 3, 6 and 9: the latest of each log interval is told.
    assert [line["step"] for line in lines] == [4, 8, 11]
    layers = trainer.optim.grass.layers
    for line in lines:
        assert line["layers"].keys() == layers.keys()
        for name, layer in line["layers"].items():
            assert layer["changed"] <= layer["selected"] == layers[name].rank <= layer["ever_selected"]
            assert layer["rows"] == layers[name].selectable
    dense, _ = train(overrides("run.name=dense", grass=["optim=adamw"]))
    assert not dense.selection_file.exists()


def test_a_nonfinite_loss_stops_the_run(overrides):
    with pytest.raises(FloatingPointError, match=r"lower optim\.lr"):
        train(overrides("optim.lr=1e18", "optim.linear_lr=1e18", "optim.clip=0", "train.steps=30"))


def test_a_profile_records_the_steps_asked_for_after_the_first_three(overrides):
    folder, _ = train(overrides("train.profile=2"))
    with gzip.open(folder.profile / "trace.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::mm" in names
    assert f"wrote a profile to {folder.profile}" in folder.log_file.read_text()


def test_a_machine_without_a_compiler_trains_and_says_so(overrides, root, tmp_path):
    env = {**os.environ, "CXX": "/nonexistent", "PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    result = run_cli(root, *overrides("train.compile=true"), env=env)
    assert result.returncode == 0
    assert "torch.compile does not work on this machine (" in result.stderr
    assert "); training continues without it" in result.stderr


def test_a_signal_saves_and_exits_with_its_own_code(overrides, root, tmp_path):
    command = [sys.executable, "-m", "pretrain.train", *overrides("train.steps=100000")]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 3 ·" in line:
            process.terminate()
            break
    assert "resumes the run from here" in process.stderr.read()
    assert process.wait(60) == 85
    assert latest(tmp_path / "run" / "checkpoints") is not None


def test_bad_settings_give_one_message_with_every_problem_and_no_traceback(overrides, root):
    result = run_cli(root, *overrides("optim.ranc=3", "train.steps=many", "model=llama_nono"))
    assert result.returncode == 2
    assert "did you mean optim.rank?" in result.stderr
    assert "train.steps=many: Value 'many'" in result.stderr
    assert "did you mean llama_nano?" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_runs_never_share_a_folder(overrides):
    config = load(overrides())
    with RunFolder(config).locked(), pytest.raises(ConfigError, match=r"another run uses .* another run\.name"):
        train(overrides())
    train(overrides())


def test_with_masters_the_weights_are_the_rows_rounded_at_every_step(overrides):
    config = load(overrides("train.dtype=bfloat16", "optim.master_weights=true", "optim.refresh_every=2"))
    trainer = Trainer(config, ALONE, ready(config, 1), RunFolder(config), StopRequest())
    trainer.optim.grass.start(lambda: trainer.update.accumulate(trainer.feed.micro_batches(0)))
    for step in range(6):
        for layer in trainer.optim.grass.layers.values():
            assert torch.equal(layer.weight.index_select(layer.dim, layer.index), layer.rows.bfloat16())
        trainer.train_step(step)


def test_one_launch_is_one_run(root):
    result = run_cli(root, "-m", "train.steps=2,3")
    assert result.returncode == 2
    assert "for a sweep, use ./launch.sh -m" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("mode", ["every:2", "selective"])
def test_a_run_under_checkpointing_logs_the_same_losses_and_gradient_norms(mode, overrides, tmp_path):
    logged = []
    for each in ("none", mode):
        folder, trainer = train(overrides(f"train.checkpointing={each}", f"run.name={each.replace(':', '-')}"))
        assert trainer.model.layers[0].checkpointing == ("full" if each == "every:2" else each)
        lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
        logged.append([(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line])
    assert logged[0] == logged[1]
    assert len(logged[0]) == 8


def test_a_run_with_the_loss_in_chunks_logs_the_losses_of_the_plain_one(overrides):
    """Sums in another order: equal to a few roundings of fp32, in training and in validation."""
    (whole, _), (chunked, trainer) = (
        train(overrides("optim=adamw", f"run.name=chunk-{chunk}", f"train.loss_chunk_tokens={chunk}", grass=[]))
        for chunk in ("null", 24)
    )
    assert trainer.model.loss_chunk_tokens == 24
    assert losses(chunked) == pytest.approx(losses(whole), rel=1e-5)
    scores = [json.loads(folder.summary_file.read_text())["val/loss"] for folder in (whole, chunked)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
