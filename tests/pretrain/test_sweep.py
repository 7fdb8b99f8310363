"""Sweeps: names of jobs, what is refused before the first, and that a failed job takes nothing from the others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.cli.signals import EXIT_CODE
from pretrain.config.schema import ConfigError
from pretrain.runs.report_page import write_report
from pretrain.runs.sweep_results import JobResult, results
from pretrain.sweep import begin, combinations, job_name, parse, report, run_sweep

SMALL = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.vocab_size=400", "train.seq_len=32", "train.tokens_per_step=64", "train.steps=2", "train.compile=false",
    "train.eval_sequences=2", "train.sample_tokens=0", "optim.warmup_steps=1", "logger.wandb.mode=disabled",
    "data=text", "data.paths=[models,optim]", "optim.rank=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return [*SMALL, f"data.root={tmp_path_factory.mktemp('prepared')}"]


def sweep(overrides: list[str], **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "pretrain.sweep", "-m", *overrides]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, **options)


def test_a_name_is_short_safe_and_the_same_in_any_order():
    assert job_name(["optim.rank=64", "optim.lr=0.001"]) == "lr-0.001_rank-64"
    assert job_name(["optim.lr=0.001", "optim.rank=64"], ["train.steps=5"]) == "lr-0.001_rank-64_steps-5"
    assert job_name(["optim.name=a", "model.name=b"]) == "model.name-b_optim.name-a"
    assert job_name(["optim.rank=4", "run.root=a", "logger.wandb.mode=disabled"]) == job_name(["++optim.rank=4"])
    assert job_name([]) == "default"
    many = [f"data.key{i}=value" for i in range(50)]
    names = [job_name(swept, many) for swept in (["optim.rank=4"], ["optim.rank=8"], many, ["x=a/b"], ["x=a:b"])]
    assert len(set(names)) == 5 and all(len(name) < 120 and not set(name) & set('/\\:*?"<>| ') for name in names)
    assert job_name(["optim.rank=4"], many) != job_name(["optim.rank=4"], many[1:])


def test_what_no_job_could_run_is_refused_before_the_first(tmp_path):
    with pytest.raises(ConfigError) as error:
        begin(["optim.ranc=4,8", "train.steps=2,many", f"run.root={tmp_path}"])
    assert "did you mean optim.rank?" in str(error.value) and "'many'" in str(error.value)
    with pytest.raises(ConfigError, match="every job gets its own name"):
        begin(["run.name=a,b", f"run.root={tmp_path}"])
    with pytest.raises(ConfigError) as error:  # each is wrong in another way, and only with the values it has
        begin([*SMALL, "optim.rank=0,8,33", "optim.lr=0,1e-3", f"run.root={tmp_path}"])
    for problem in ("optim.rank=0 must be between", "optim.rank=33 must be between", "optim.lr=0.0 must be greater"):
        assert problem in str(error.value)
    assert str(error.value).count("optim.lr=0.0") == 1  # although three jobs have it
    assert list(tmp_path.iterdir()) == []


def test_the_table_marks_the_best_job_and_names_the_command_of_the_report(tmp_path, capsys, caplog):
    jobs = []
    for name, loss in {"lr-0.1": 4.5, "lr-0.01": 3.25}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"val/loss": loss, "tokens_per_s": 12345.6}))
        jobs.append(JobResult(name, [], str(tmp_path / name), str(tmp_path / "log"), exit_code=0))
    with caplog.at_level("INFO"):
        assert report(jobs) == 0
    assert capsys.readouterr().out.splitlines() == [
        "lr-0.1   finished     validation loss 4.5000, 12,346 tokens/s",
        "lr-0.01  finished     validation loss 3.2500, 12,346 tokens/s  best",
    ]
    assert f"-m pretrain.report {tmp_path}" in caplog.text


def occupy(folder: Path, rank: int, overrides: list[str]) -> None:
    """Make the job of ``rank`` fail when it starts: a file is where its folder should be."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = combinations(parse([o for o in overrides if not o.startswith("optim.rank=")]))[0]
    (folder / job_name([f"optim.rank={rank}"], shared)).touch()


def test_a_failed_job_takes_nothing_from_the_others_and_a_finished_one_is_left_alone(small, tmp_path):
    folder = tmp_path / "a sweep"
    overrides = [*small, "optim.rank=4,8"]
    occupy(folder, 4, small)
    failed, finished = run_sweep(overrides, root=str(folder), jobs=2)
    assert failed.status == "failed" and failed.name in failed.reason and failed.summary is None
    assert finished.status == "finished" and "optim.rank=8" in finished.overrides
    assert Path(finished.folder).parent == folder and finished.summary["steps"] == 2
    assert finished.summary["commit"].removesuffix("-dirty") == git("rev-parse", "HEAD")
    again = sweep(
        [*overrides, f"run.root='{tmp_path}'", "run.name='a sweep'"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    table, progress = (text.splitlines() for text in again.communicate(timeout=500))
    assert again.returncode == 1
    assert [line.split(", ")[0] for line in progress if " starts; " in line] == [f"sweep: job {n} of 2" for n in (1, 2)]
    assert [line.split()[1] for line in table] == ["failed", "finished"] and "error" in table[0]
    latest = results(max((folder / "_sweeps").iterdir()))
    assert latest[1].name == finished.name and "is finished at step 2" in Path(latest[1].log).read_text()


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_of_six_jobs_one_of_which_fails_five_end_well_and_the_report_names_the_sixth(small, tmp_path):
    common = [o for o in small if o != "optim.rank=8"]
    occupy(tmp_path / "six", 32, common)
    six = [*common, "optim.rank=1,2,4,8,16,32", f"run.root={tmp_path}", "run.name=six"]
    process = sweep(six, stdout=subprocess.PIPE)
    table = process.communicate(timeout=900)[0].splitlines()
    assert process.returncode == 1
    assert [line.split()[1] for line in table] == ["finished"] * 5 + ["failed"]
    assert "error" in table[-1] and all("validation loss" in line for line in table[:5])
    assert len(list(tmp_path.glob("six/*/summary.json"))) == 5
    page = write_report([tmp_path / "six"], tmp_path / "report").read_text()
    assert "<h1>5 runs</h1>" in page and page.count("<h2>Failed</h2>") == 1
    (failure,) = re.findall("<li>(.*?)</li>", page)
    assert failure.startswith("rank-32") and "error" in failure


@pytest.mark.slow
def test_a_signal_saves_the_job_at_work_and_begins_no_other(small, tmp_path):
    overrides = [*small, "train.steps=100000", "train.seed=0,1", f"run.root={tmp_path}"]
    process = sweep(overrides)
    while not list(tmp_path.glob("sweep/*/metrics.jsonl")):
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_CODE
    (logs,) = (tmp_path / "sweep/_sweeps").iterdir()
    assert [job.status for job in results(logs)] == ["stopped", "not started"]
    assert list(tmp_path.glob("sweep/*/checkpoints/*"))


@pytest.mark.slow
def test_optuna_looks_for_the_least_validation_loss_and_makes_the_same_trials_again(small, tmp_path):
    search = [
        *(o for o in small if o != "optim.rank=8"), f"run.root={tmp_path}", "optim.lr=tag(log,interval(1e-4,1e-1))",
        "optim.rank=choice(4,33)", "hydra/sweeper=optuna_loss", "hydra.sweeper.n_trials=4",
    ]  # fmt: skip
    jobs = []
    for _ in range(2):
        assert sweep(search).wait(timeout=900) == 1
        logs = max((tmp_path / "sweep/_sweeps").iterdir())
        jobs.append(results(logs))
    assert [job.name for job in jobs[0]] == [job.name for job in jobs[1]]
    assert {job.status for job in jobs[0]} == {"finished", "failed"}
    least = min(job.summary["val/loss"] for job in jobs[0] if job.summary)
    assert json.dumps(least) in (logs / "optimization_results.yaml").read_text()


def test_the_slurm_launcher_is_configured_for_one_launch_a_node(root):
    command = [sys.executable, "-m", "pretrain.train", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher"]
    env = {**os.environ, "PET_NPROC_PER_NODE": "8"}
    shown = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True).stdout
    for line in ("tasks_per_node: 1", "nodes: 1", "submitit_launcher.SlurmLauncher"):
        assert line in shown


@pytest.mark.slow
def test_submitit_runs_each_job_in_a_process_of_its_own(small, tmp_path):
    options = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", f"run.root={tmp_path}"]
    assert sweep([*small, "train.seed=0,1", *options]).wait(timeout=900) == 0
    assert len(list(tmp_path.glob("sweep/*/summary.json"))) == 2
