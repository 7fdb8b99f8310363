"""The host's side of training on a GPU, on one that computes nothing (tests/null_gpu): `./test.sh -m null_gpu`.

The trainer from its command, compiled kernels, memory beside the plan, checkpoints, and how many kernels and waits a
step takes. GRASS_NULL_GPU names the folder of the null GPU where that is not .null_gpu in the repository.
"""

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NULL_GPU = ROOT / "tests" / "null_gpu"
DATA = ["data=text", "data.paths=[README.md,docs]", "model.vocab_size=500", "logger.wandb.mode=disabled"]
STEP_350M = ["model=llama_350m", "train.seq_len=1024", "train.tokens_per_step=16384", "train.dtype=bfloat16"]
GRASS = ["optim=grass", "optim.rank=128"]
METHODS = {
    "adamw": ["optim=adamw"],
    "muon": ["optim=muon"],
    "grass": GRASS,
    "grass-on-adamw": [*GRASS, "optim.inner=adamw"],
    "grass-in-bf16": [*GRASS, "optim.state_dtype=bfloat16"],
}

pytestmark = [pytest.mark.null_gpu, pytest.mark.usefixtures("null_gpu")]


@pytest.fixture(scope="session")
def null_gpu():
    made = subprocess.run([NULL_GPU / "setup.sh"], capture_output=True, text=True, timeout=3600)
    if made.returncode == 3:
        pytest.skip(made.stderr.strip().splitlines()[-1])
    assert made.returncode == 0, made.stderr


def run(*command: object, timeout: int = 900, **environment: str) -> str:
    """What a command prints on the null GPU, in the repository."""
    done = subprocess.run(
        [NULL_GPU / "run.sh", *map(str, command)],
        cwd=ROOT, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def train(folder: Path, *settings: str, **environment: str) -> tuple[str, list[dict]]:
    """What the trainer prints, and what was counted in each of its steps. Numbers that mean nothing do not stop it."""
    counts = folder / "counts.jsonl"
    settings = (*DATA, f"data.root={folder}/prepared", f"run.root={folder}", "run.name=run", *settings)
    printed = run("python", NULL_GPU / "train.py", f"--counts={counts}", *settings, **environment)
    return printed, [json.loads(line) for line in counts.read_text().splitlines()]


@cache
def measure(*arguments: str, **environment: str) -> dict:
    """What measure.py finds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        run("python", NULL_GPU / "measure.py", f"--json={file}", *arguments, **environment)
        return json.loads(file.read_text())


# A run, from the command that everybody begins with.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_command_trains_to_its_end_compiled(tmp_path, dtype):
    printed, _ = train(tmp_path, "train.steps=20", "optim.warmup_steps=5", f"train.dtype={dtype}")
    assert "finished" in printed
    assert "does not work" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["compile_seconds"] > 0


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_block_with_probes_is_compiled_to_kernels(tmp_path, capability):
    without = measure_afresh(tmp_path, capability, "optim=adamw")
    found = measure_afresh(tmp_path, capability, "optim=grass", "optim.selection=top_r")
    assert found["graph_breaks"] == 0
    assert found["graphs"] > without["graphs"]  # a block with probes has a graph of its own
    assert found["graphs_in_measured_steps"] == 0
    described = [json.loads(file.read_text()) for file in (tmp_path / "triton").rglob("*.json")]
    targets = {kernel["target"]["arch"] for kernel in described if "target" in kernel}
    assert targets == {int(float(capability) * 10)}
    assert list((tmp_path / "triton").rglob("*.cubin"))
    assert "triton_" in (tmp_path / "names").read_text()


def measure_afresh(folder: Path, capability: str, *settings: str) -> dict:
    """With nothing compiled by an earlier run; kernels by name are in ``names``, compiled ones in ``triton``."""
    return measure(
        f"--names={folder}/names", "model=llama_nano", "model.num_hidden_layers=2", *settings,
        "train.seq_len=128", "train.tokens_per_step=512",
        NULL_GPU_CAPABILITY=capability,
        TRITON_CACHE_DIR=f"{folder}/triton", TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor",
    )  # fmt: skip


def test_three_saves_and_a_resume(tmp_path):
    settings = ["train.checkpoint_every=4", "optim.warmup_steps=5", "train.eval_every=0"]
    printed, _ = train(tmp_path, "train.steps=12", *settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {"step-00000004", "step-00000008", "step-00000012"} <= {path.name for path in checkpoints.iterdir()}
    assert "not saved" not in printed
    printed, counted = train(tmp_path, "train.steps=16", *settings)
    assert counted[0]["step"] == 12
    assert (checkpoints / "step-00000016").exists()


def test_saving_stays_on_its_device(tmp_path):
    printed = run("python", NULL_GPU / "saves.py", tmp_path, NULL_GPUS="2", timeout=300)
    assert "contexts on [1]" in printed


# Memory, by torch's own allocator.


@pytest.mark.parametrize("experiment", ["13b_40gb", "7b_24gb"])
def test_experiments_take_what_is_planned(experiment):
    found = measure_experiment(experiment)
    assert found["allocated_gib"] == pytest.approx(found["planned_gib"], rel=0.02)


@cache
def measure_experiment(experiment: str) -> dict:
    """The first steps of an experiment as it is configured, but for the number of its micro-batches."""
    return measure("--plan", "--warm=2", "--steps=5", f"experiment={experiment}", "train.tokens_per_step=4096")


def test_one_of_eight_under_fsdp_takes_what_is_planned():
    found = measure(
        "--processes=8", "--plan", "--warm=2", "--steps=4", "train.parallel=fsdp", "model=llama_350m", "optim.rank=128",
        "train.seq_len=256", "train.tokens_per_step=32768", "train.dtype=bfloat16", "train.lean_activations=true",
        "train.compile=false",
    )  # fmt: skip
    assert found["allocated_gib"] == pytest.approx(found["planned_gib"], rel=0.02)


# What a step asks of the host: of 350M parameters, r = 128, in bf16, compiled.


@cache
def measure_350m(method: str) -> dict:
    return measure(*STEP_350M, *METHODS[method], "--steps=20", "--beside=optim=adamw")


@pytest.mark.parametrize("method", ["grass", "grass-on-adamw"])
def test_launches_of_a_step(method):
    found = measure_350m(method)
    assert max(found["launches"]) <= 2000
    assert found["graphs_in_measured_steps"] == 0


def test_rows_in_bf16_are_rounded_for_many_blocks_at_once():
    found = measure_350m("grass-in-bf16")
    assert max(found["launches"]) <= 3000
    assert found["host_to_beside"] <= 3


@pytest.mark.parametrize(
    ("method", "bound"),
    [("grass", 1.3), ("grass-on-adamw", 1.5)],  # scores are gathered, and a block refreshes in every second step
)
def test_host_time_of_a_step_is_near_that_of_adamw(method, bound):
    assert measure_350m(method)["host_to_beside"] <= bound


@pytest.mark.parametrize("method", METHODS)
def test_waits_of_a_step(method):
    assert_waits_only_for_a_choice(measure_350m(method))


@pytest.mark.parametrize("experiment", ["13b_40gb", "7b_24gb"])
def test_waits_of_the_experiments(experiment):
    assert_waits_only_for_a_choice(measure_experiment(experiment))


def assert_waits_only_for_a_choice(found: dict) -> None:
    """At most one wait in a step that chooses rows, none in others; a copy that is not pinned may be a wait as well."""
    for kind in ("waits", "pageable_copies"):
        assert all(n <= refreshed for n, refreshed in zip(found[kind], found["refreshed"], strict=True)), (kind, found)


@pytest.mark.parametrize("optim", ["adamw", "muon", "grass"])
def test_waits_of_the_trainer(tmp_path, optim):
    """One in a step that is logged or chooses rows (of all blocks at once, here), none in others."""
    every = ["train.log_every=3", "train.eval_every=0", "train.checkpoint_every=0"]
    chooses = ["optim.refresh_every=10", "optim.stagger=false"] if optim == "grass" else []
    _, counted = train(tmp_path, f"optim={optim}", "train.steps=24", "optim.warmup_steps=5", *every, *chooses)
    waits = [max(step.get("waits", 0), step.get("pageable_copies", 0)) for step in counted]
    may = [(step + 1) % 3 == 0 or (bool(chooses) and (step + 1) % 10 == 0) for step in range(24)]
    # The first step makes the optimizer's state, the last ends the run.
    assert all(n <= allowed for n, allowed in list(zip(waits, may, strict=True))[1:-1]), waits
