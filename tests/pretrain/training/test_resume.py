"""Resumed runs: equal to uninterrupted ones, on one process and on two, and refused with other settings or data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.tensors import tensors_of
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.runs.folder import RunFolder
from tests.tiny_runs import GRASS, losses, run_cli, selections, train

BF16_ROWS = ["train.dtype=bfloat16", "optim.state_dtype=bfloat16"]
SAMPLED = "multinomial_norm_with_replacement"


class StopAfter(StopRequest):
    """A request to stop that comes during step ``step``, which is then the last one."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def __bool__(self):
        self.left -= 1
        return self.left <= 0


def state(trainer):
    return {name: tensor.clone() for name, tensor in tensors_of(trainer.model, trainer.optim).items()}


@pytest.mark.parametrize(
    "grass",
    [
        GRASS,
        ["optim=adamw"],
        [*GRASS, "optim.score=exact", "optim.state_at_refresh=reset"],
        [*GRASS, "optim.probe_steps=3", "optim.stagger=true"],
        [*GRASS, "optim.side=columns", "optim.share_index=true"],
        [*GRASS, "optim.patterns=[lm_head,up_proj]", "optim.side={lm_head: rows}"],
        [
            *GRASS,
            "optim.selection=multinomial_norm_with_replacement",
            "train.dtype=bfloat16",
        ],
        [*GRASS, "train.dtype=bfloat16", "optim.master_weights=true"],
        [*GRASS, *BF16_ROWS, "optim.weight_decay=0.1"],
        [*GRASS, *BF16_ROWS, f"optim.selection={SAMPLED}", "optim.inner=adafactor"],
        [*GRASS, "optim.norm_growth=1.01", "optim.clip=0"],
        [*GRASS, "optim.inner=sgd", "optim.weight_decay=0.1"],
        [*GRASS, "optim.inner=adafactor", "optim.stagger=true"],
        [*GRASS, *BF16_ROWS, "optim.inner=normuon", "optim.side={*: rows, down_proj: columns}"],
        pytest.param([*GRASS, "optim.inner=adamw8bit"], marks=pytest.mark.slow),  # compiles for most of a minute
        [*GRASS, "optim.embedding_inner=adamw8bit"],
        [*GRASS, "optim.embedding_inner=adafactor"],
        [*GRASS, "optim.int8_weights=true", *BF16_ROWS],
        [*GRASS, "optim.selection=cyclic", "optim.stagger=true", "optim.side=neurons"],
    ],
    ids=[
        "grass",
        "adamw",
        "exact-reset",
        "staggered-probes",
        "shared-columns",
        "head",
        "bf16-sampled",
        "bf16-masters",
        "bf16",
        "bf16-sampled-adafactor",
        "norm-growth",
        "sgd",
        "adafactor",
        "normuon",
        "8bit",
        "8bit-embeddings",
        "adafactor-embeddings",
        "int8",
        "cyclic",
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(overrides, grass):
    """20 steps, stopped in the middle of a window and of its probes, all objects anew, 20 more."""
    whole_folder, whole = train(overrides("run.name=whole", "train.steps=40", grass=grass))
    halves = overrides("run.name=halves", "train.steps=40", grass=grass)
    folder, first = train(halves, StopAfter(20))
    assert first.step == 20
    folder, second = train(halves)
    assert len(losses(folder)) == 40
    assert losses(folder) == losses(whole_folder)
    assert selections(folder) == selections(whole_folder)
    expected, resumed = state(whole), state(second)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def launch(root, processes, overrides):
    """Run in processes of their own; returns the run's folder."""
    command = [sys.executable, "-m", "pretrain.launch", "--nproc-per-node", str(processes), "-m", "pretrain.train"]
    subprocess.run(
        [*command, *overrides], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120
    )
    return RunFolder(load(overrides))


def assert_same_losses(folder, other, tolerance=0.0):
    ours, theirs = losses(folder), losses(other)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in ours) <= tolerance


def test_two_processes_and_accumulation_equal_one_process(overrides, root):
    common = overrides("train.dtype=float64", "train.steps=12")
    one, _ = train([*common, "run.name=one", "train.micro_batch_size=8"])
    two = launch(root, 2, [*common, "run.name=two", "train.micro_batch_size=4"])
    accumulated = launch(root, 2, [*common, "run.name=accumulated", "train.micro_batch_size=1"])
    for folder in (two, accumulated):
        assert_same_losses(folder, one, tolerance=1e-10)
        ours, theirs = (json.loads(f.summary_file.read_text()) for f in (folder, one))
        for name in ("val/loss", "val/bits_per_byte"):
            assert abs(ours[name] - theirs[name]) < 1e-10


def test_two_processes_resume_to_the_bit_and_one_goes_on_from_them(overrides, root):
    common = overrides("train.dtype=float64", "optim.schedule=constant", "train.micro_batch_size=4")
    whole = launch(root, 2, [*common, "run.name=whole", "train.steps=12"])
    launch(root, 2, [*common, "run.name=halves", "train.steps=6"])
    halves = launch(root, 2, [*common, "run.name=halves", "train.steps=12"])
    assert_same_losses(halves, whole)
    expected, resumed = (tensors_in(f.latest_checkpoint) for f in (whole, halves))
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    alone, _ = train([*common, "run.name=alone", "train.steps=16"])
    halves, _ = train([*common, "run.name=halves", "train.steps=16"])
    assert_same_losses(halves, alone, tolerance=1e-10)


def tensors_in(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_metric_lines_after_the_checkpoint_are_moved_aside(overrides):
    grass = ["optim.rank=8", "optim.refresh_every=1"]
    folder, _ = train(overrides("train.checkpoint_every=4", "train.steps=6", grass=grass))
    (folder.checkpoints / "step-00000006").rename(folder.path / "elsewhere")
    train(overrides("train.checkpoint_every=4", "train.steps=6", grass=grass))
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in selections(folder)[1]] == [1, 2, 3, 4, 5, 6]
    for kind in ("metrics", "selection"):
        aside = folder.path / f"{kind}.after-step-4.jsonl"
        assert {json.loads(line)["step"] for line in aside.read_text().splitlines()} == {5, 6}
    assert (folder.path / "summary.before.json").exists()


def test_a_finished_run_is_left_alone(overrides, root):
    folder, _ = train(overrides())
    before = files_of(folder)
    result = run_cli(root, *overrides())
    assert result.returncode == 0
    assert "is finished at step 8; raise train.steps or choose a new run.name" in result.stderr
    assert files_of(folder) == before


def test_a_resumed_run_may_change_steps_and_rates_and_nothing_else(overrides):
    folder, _ = train(overrides())
    train(overrides("train.steps=10", "optim.lr=1e-3"))
    assert max(losses(folder)) == 10
    assert "optim.lr: 0.024 → 0.001" in folder.log_file.read_text()
    assert "steps: 8" in (folder.path / "config.before.yaml").read_text()
    with pytest.raises(ConfigError, match=r"optim\.rank was 8, is now 4"):
        train(overrides("train.steps=12", "optim.rank=4"))
    with pytest.raises(ConfigError, match=r"choose another run\.name"):
        train(overrides("train.resume=never"))


def test_another_corpus_or_tokenizer_is_refused_on_resume(overrides, root, tmp_path):
    train(overrides())
    with pytest.raises(ConfigError, match=r"data\.paths was"):
        train(overrides("train.steps=10", f"data.paths=[{root / 'pretrain'}]"))
    text = tmp_path / "text"
    text.mkdir()
    for file in (root / "optim").glob("*.py"):
        (text / file.name).write_bytes(file.read_bytes())
    own = [f"data.paths=[{text}]", "run.name=own"]
    train(overrides(*own))
    (text / "more.py").write_text("print('more')\n" * 400)
    with pytest.raises(ValueError, match="another corpus or tokenizer"):
        train(overrides(*own, "train.steps=10"))


def test_a_run_killed_before_its_summary_validates_again_and_repeats_no_line(overrides):
    folder, _ = train(overrides())
    folder.summary_file.unlink()
    train(overrides())
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [8]
    assert folder.summary_file.exists()


def test_a_run_of_an_older_version_may_lack_new_keys(overrides):
    folder, _ = train(overrides())
    text = folder.config_file.read_text()
    assert "  sketch_width: 16\n" in text
    folder.config_file.write_text(text.replace("  sketch_width: 16\n", ""))
    train(overrides("train.steps=10"))
    assert max(losses(folder)) == 10


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_repeats_no_line(overrides):
    folder, _ = train(overrides("train.eval_every=4"))
    (folder.checkpoints / "step-00000008").rename(folder.path / "elsewhere")
    (folder.checkpoints / "latest").unlink()
    train(overrides("train.eval_every=4"))
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 4, 8]
    assert sorted(losses(folder)) == list(range(1, 9))


def files_of(folder):
    """All that a run left, but for its log: in these tests earlier runs of the process still write to it."""
    return {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file() and p != folder.log_file}
