"""The dry run: its plan against the model and the data themselves, and that it leaves nothing behind."""

import resource
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from data.prepare import prepare
from data.settings import DataSettings
from pretrain.config.compose import CONF, load
from pretrain.config.schema import ConfigError
from pretrain.planner.plan import dry_run
from pretrain.runs.folder import RunFolder
from pretrain.setup.model import build_model
from pretrain.sweep import begin
from pretrain.train import run

TINY = [
    "model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=2",
    "model.num_hidden_layers=1", "train.seq_len=16", "train.tokens_per_step=64", "train.micro_batch_size=2",
    "train.steps=100", "optim.rank=4", "optim.sketch_width=4", "data=text",
]  # fmt: skip


def tiny(tmp_path, *overrides):
    return load([*TINY, f"run.root={tmp_path / 'runs'}", f"data.root={tmp_path / 'prepared'}", *overrides])


def test_it_needs_no_data_writes_nothing_and_tells_what_the_run_would_be(tmp_path, capsys):
    config = tiny(tmp_path, "data.paths=[nowhere]", "train.dry_run=true")
    assert run(config) == 0
    assert list(tmp_path.iterdir()) == []
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    told = {name: text.strip() for name, text in told.items()}
    model = build_model(config, torch.device("cpu"))
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("rows"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told["model"] == f"llama_nano, {weights / 1e6:.1f}M parameters"
    assert told["trained at a time"] == f"{trained / 1e6:.1f}M, {trained / weights:.1%}, by grass"
    assert told["a step"] == "64 tokens: 1 process × 2 micro-batches × 2 sequences × 16 tokens"
    assert told["the run"] == "100 steps, 6,400 tokens; the data (text) is not prepared yet"
    assert told["would write to"] == f"{tmp_path / 'runs' / config.run.name}, a new run"


def test_it_logs_the_layers_of_the_model_and_not_those_of_the_models_it_simulates(tmp_path, caplog):
    caplog.set_level("INFO")
    dry_run(tiny(tmp_path, "data.paths=[nowhere]", "model.num_hidden_layers=8"), 1)
    assert [line.split(";")[0] for line in caplog.messages if line.startswith("converted")] == [
        "converted 56 of 57 linear layers to Grass: 32 of rank 7, 24 of rank 2"
    ]


def test_it_counts_epochs_of_data_that_are_prepared(tmp_path, capsys):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"the {number}th text of this test " * 20)
    config = tiny(tmp_path, f"data.paths=[{tmp_path}/*.txt]")
    prepared = prepare(DataSettings(**{f.name: getattr(config.data, f.name) for f in fields(DataSettings)}))
    dry_run(config, 1)
    epochs = 100 * 4 / ((len(prepared.train) - 1) // 16)
    assert f"6,400 tokens, {epochs:.2f} epochs of {prepared.folder}" in capsys.readouterr().out


def test_it_refuses_what_the_run_would(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.rank=400 must be between"):
        dry_run(tiny(tmp_path, "optim.rank=400"), 1)
    with pytest.raises(ConfigError, match="does not fit"):
        dry_run(tiny(tmp_path, "estimate.device_memory_gib=0.1"), 1)
    RunFolder(config := tiny(tmp_path)).open(config, 0)
    with pytest.raises(ConfigError, match=r"exists; choose another run\.name"):
        dry_run(tiny(tmp_path, "train.resume=never"), 1)
    with pytest.raises(ConfigError, match="plans one run"):
        begin(["optim.rank=4,8", "train.dry_run=true", f"run.root={tmp_path}"])


EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", ["c4_60m", "galore_60m", "paper_60m"])
def test_an_experiment_of_each_kind_can_be_planned_without_its_data(name, tmp_path, capsys):
    """In one block: what a plan costs grows with the number of operations, which is that of blocks."""
    short = ["model.num_hidden_layers=1", f"run.root={tmp_path}"]
    dry_run(load([f"experiment={name}", *short]), 1)
    assert f"would write to      {tmp_path}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_planned(name, tmp_path):
    dry_run(load([f"experiment={name}", f"run.root={tmp_path}"]), 1)


@pytest.mark.slow
def test_13b_is_planned_in_the_memory_of_a_laptop(root, tmp_path):
    plan = ["model=llama_13b", "train.dtype=bfloat16", "train.dry_run=true", f"run.root={tmp_path}"]
    command = [sys.executable, "-m", "pretrain.train", *plan]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "13,015.9M parameters" in result.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB: of the largest child so far
    assert list(tmp_path.iterdir()) == []
