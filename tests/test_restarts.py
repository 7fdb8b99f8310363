"""A run whose processes are killed starts again by itself, and ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel_runs import TINY
from safetensors.torch import load_file

from pretrain.config import load
from pretrain.preflight import ready
from pretrain.run_folder import RunFolder


@pytest.fixture
def common(root, tmp_path):
    """Overrides of a tiny run in the precision where the order of a sum shows."""
    text = [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={tmp_path / 'prepared'}"]
    precise = ["train.dtype=float32", "train.checkpoint_every=4", "optim.inner=adamw"]
    overrides = [*TINY, *text, *precise, f"run.root={tmp_path / 'runs'}"]
    ready(load([*overrides, "run.name=none"]), 1)
    return overrides


def start(root, ranks, overrides, restarts=0):
    flags = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain.launch", *flags, "-m", "pretrain.train", *overrides],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(launcher):
    """The processes of the run by rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0") if parent == launcher.pid else []
        except (OSError, ValueError):  # it has just ended
            continue
        found |= {int(v.removeprefix(b"RANK=")): int(stat.parent.name) for v in variables if v.startswith(b"RANK=")}
    return found


def steps(folder):
    lines = folder.metrics_file.read_text().splitlines() if folder.metrics_file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and "train/loss" in line]


def kill_at_random(launcher, folder, ranks, times, seed):
    """Kill one process, whichever, whenever the run has made a few steps since the last time; returns their ranks."""
    draw, killed, deadline = random.Random(seed), [], time.monotonic() + 60 + 120 * times
    while len(killed) < times:
        before, further = folder.metrics_file.stat().st_mtime_ns if steps(folder) else 0, draw.randrange(1, 6)
        for _ in range(further):  # every line of metrics.jsonl is a step
            while not steps(folder) or folder.metrics_file.stat().st_mtime_ns == before:
                assert launcher.poll() is None and time.monotonic() < deadline, f"{killed} were killed so far"
                time.sleep(0.01)
            before = folder.metrics_file.stat().st_mtime_ns
        time.sleep(draw.random() * 0.1)
        rank = draw.randrange(ranks)
        os.kill(workers(launcher)[rank], signal.SIGKILL)
        killed.append(rank)
        gone = set(workers(launcher).values())
        while set(workers(launcher).values()) & gone:  # the others end too, and all are started again
            time.sleep(0.05)
    return killed


def tensors_in(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def losses(folder):
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def assert_kills_leave_no_trace(root, common, ranks, times, length, engine=()):
    common = [*common, f"train.steps={length}", *engine]
    whole, killed = (RunFolder(load([*common, f"run.name={name}"])) for name in ("whole", "killed"))
    undisturbed = start(root, ranks, [*common, "run.name=whole"])
    _, err = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, err
    launcher = start(root, ranks, [*common, "run.name=killed"], restarts=times)
    try:
        who = kill_at_random(launcher, killed, ranks, times, seed=length)
        _, err = launcher.communicate(timeout=600)
    finally:
        launcher.terminate()  # it ends its workers
    assert launcher.returncode == 0, err
    for rank in set(who):
        assert err.count(f"launch: worker rank {rank} was killed by SIGKILL") == who.count(rank)
    assert steps(killed) == list(range(1, length + 1))
    assert losses(killed) == losses(whole)
    expected, found = tensors_in(whole.latest_checkpoint), tensors_in(killed.latest_checkpoint)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_run_whose_processes_are_killed_starts_again_and_ends_as_if_nothing_had_happened(root, common):
    assert_kills_leave_no_trace(root, common, ranks=2, times=2, length=24)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_twenty_kills_of_four_processes_leave_no_trace(root, common, engine):
    assert_kills_leave_no_trace(root, common, 4, times=20, length=120, engine=[f"train.parallel={engine}"])
