"""Whole runs of a tiny model: what they leave, resuming to the bit, and one process against two."""

import gzip
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.directory import latest
from pretrain.checkpoint.tensors import tensors_of
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = [
    "data=text", "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "optim.warmup_steps=2", "train.steps=8",
    "train.tokens_per_step=256", "train.micro_batch_size=2",
    "train.seq_len=32", "train.eval_sequences=4", "train.log_every=1", "train.checkpoint_every=0", "train.eval_every=0",
    "train.compile=false", "train.sample_tokens=4", "logger.wandb.mode=disabled",
]  # fmt: skip
GRASS = ["optim.rank=8", "optim.attention_weight=1", "optim.selection=top_r", "optim.refresh_every=7"]
BF16_ROWS = ["train.dtype=bfloat16", "optim.state_dtype=bfloat16"]
LOGGED = [
    "step", "tokens", "train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/step_s", "perf/data_s",
    "perf/tflops", "mem/peak_bytes",
]  # fmt: skip
SAMPLED = "multinomial_norm_with_replacement"


@pytest.fixture(scope="session")
def corpus(root, tmp_path_factory):
    """Overrides for a small corpus of real text: a few of the project's own files."""
    prepared = tmp_path_factory.mktemp("prepared")
    return [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={prepared}", "data.validation_share=0.2"]


@pytest.fixture(autouse=True)
def logging_of_a_run():
    """Log as a run does, and undo what it set up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.setLevel(logging.INFO)
    yield
    root.handlers, root.level = handlers, level


@pytest.fixture
def overrides(corpus, tmp_path):
    """Overrides of a run in a folder of its own, later ones winning."""
    return lambda *more, grass=GRASS: [*TINY, *corpus, f"run.root={tmp_path}", "run.name=run", *grass, *more]


def train(overrides, stop=None):
    """Run in this process; returns the run's folder and the trainer."""
    config = load(overrides)
    folder = RunFolder(config)
    with folder.locked():
        trainer = Trainer(config, ALONE, ready(config, 1), folder, StopRequest() if stop is None else stop)
        trainer.fit()
    return folder, trainer


def losses(folder):
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def selections(folder):
    """What a run shows of its selections: in its metric lines, and by layer."""
    means = [
        {name: value for name, value in json.loads(line).items() if name.startswith("grass/")}
        for line in folder.metrics_file.read_text().splitlines()
    ]
    lines = folder.selection_file.read_text().splitlines() if folder.selection_file.exists() else []
    return [line for line in means if line], [json.loads(line) for line in lines]


def files_of(folder):
    """All that a run left, but for its log: in these tests earlier runs of the process still write to it."""
    return {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file() and p != folder.log_file}


def state(trainer):
    return {name: tensor.clone() for name, tensor in tensors_of(trainer.model, trainer.optim).items()}


def test_a_run_leaves_what_it_promises(overrides):
    folder, _ = train(overrides("train.eval_every=4", "train.checkpoint_every=4"))
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    training, validation = [x for x in lines if "train/loss" in x], [x for x in lines if "val/loss" in x]
    assert [x["step"] for x in training] == list(range(1, 9))
    assert [x["step"] for x in validation] == [0, 4, 8]
    assert abs(validation[0]["val/loss"] - math.log(400)) < 0.05  # before training every token is as likely
    for name in [
        "step",
        "tokens",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "perf/tokens_per_s",
        "perf/step_s",
        "perf/data_s",
        "perf/tflops",
        "mem/peak_bytes",
    ]:
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


class StopAfter(StopRequest):
    """A request to stop that comes during step ``step``, which is then the last one."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def __bool__(self):
        self.left -= 1
        return self.left <= 0


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


def test_a_nonfinite_loss_stops_the_run(overrides):
    with pytest.raises(FloatingPointError, match=r"lower optim\.lr"):
        train(overrides("optim.lr=1e18", "optim.linear_lr=1e18", "optim.clip=0", "train.steps=30"))


def run_cli(root: Path, *arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments],
        cwd=root, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


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
    assert "torch.compile does not work on this machine, training without it" in result.stderr


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


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_repeats_no_line(overrides):
    folder, _ = train(overrides("train.eval_every=4"))
    (folder.checkpoints / "step-00000008").rename(folder.path / "elsewhere")
    (folder.checkpoints / "latest").unlink()
    train(overrides("train.eval_every=4"))
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 4, 8]
    assert sorted(losses(folder)) == list(range(1, 9))


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
