"""A run whose processes are killed starts again by itself, and ends as if nothing had happened."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pretrain.config.compose import load
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from tests.parallel_runs import TINY, run, spawn, values


@pytest.fixture
def common(root, tmp_path):
    """Overrides of a tiny run in the precision where the order of a sum shows."""
    text = [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={tmp_path / 'prepared'}"]
    precise = ["train.dtype=float32", "train.checkpoint_every=4", "optim.inner=adamw"]
    overrides = [*TINY, *text, *precise, f"run.root={tmp_path / 'runs'}"]
    ready(load([*overrides, "run.name=none"]), 1)
    return overrides


def start(root, ranks, overrides, restarts=0, nodes=1):
    """The launcher of every node; several meet by torchrun's c10d rendezvous."""
    flags = ["--nproc-per-node", str(ranks // nodes), "--max-restarts", str(restarts)]
    if nodes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meet = f"--rdzv-backend c10d --rdzv-endpoint localhost:{free.getsockname()[1]} --rdzv-id test"
        flags += f"--nnodes {nodes} {meet} --local-addr localhost".split()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain.launch", *flags, "-m", "pretrain.train", *overrides],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(nodes)
    ]


def end(launchers):
    """What the launchers have said, once all have ended well."""
    said = [launcher.communicate(timeout=600)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), said
    return "".join(said)


def workers(launchers):
    """The processes of the run by rank."""
    found, parents = {}, {launcher.pid for launcher in launchers}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0") if parent in parents else []
        except (OSError, ValueError):  # it has just ended
            continue
        found |= {int(v.removeprefix(b"RANK=")): int(stat.parent.name) for v in variables if v.startswith(b"RANK=")}
    return found


def steps(folder):
    lines = folder.metrics_file.read_text().splitlines() if folder.metrics_file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and "train/loss" in line]


def kill_at_random(launchers, folder, ranks, times, seed):
    """Kill one process, whichever, whenever the run has made a few steps since the last time; returns their ranks."""
    draw, killed, deadline = random.Random(seed), [], time.monotonic() + 60 + 120 * times
    while len(killed) < times:
        before, further = folder.metrics_file.stat().st_mtime_ns if steps(folder) else 0, draw.randrange(1, 6)
        for _ in range(further):  # every line of metrics.jsonl is a step
            while not steps(folder) or folder.metrics_file.stat().st_mtime_ns == before:
                ended = any(launcher.poll() is not None for launcher in launchers)
                assert not ended and time.monotonic() < deadline, f"{killed} were killed so far"
                time.sleep(0.01)
            before = folder.metrics_file.stat().st_mtime_ns
        time.sleep(draw.random() * 0.1)
        rank = draw.randrange(ranks)
        os.kill(workers(launchers)[rank], signal.SIGKILL)
        killed.append(rank)
        gone = set(workers(launchers).values())
        while set(workers(launchers).values()) & gone:  # the others end too, and all are started again
            time.sleep(0.05)
    return killed


def tensors_in(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_kills_leave_no_trace(root, common, folder, ranks, times, length, engine=(), nodes=1):
    common = [*common, f"train.steps={length}", *engine]
    whole, killed = (RunFolder(load([*common, f"run.name={name}"])) for name in ("whole", "killed"))
    spawn(ranks, folder, [(run, [*common, "run.name=whole"])])
    launchers = start(root, ranks, [*common, "run.name=killed"], restarts=times, nodes=nodes)
    try:
        who = kill_at_random(launchers, killed, ranks, times, seed=length)
        said = end(launchers)
    finally:
        for launcher in launchers:
            launcher.terminate()  # it ends its workers
    for rank in set(who):
        assert said.count(f"launch: worker rank {rank} was killed by SIGKILL") == who.count(rank)
    assert steps(killed) == list(range(1, length + 1))
    assert values(killed, "train/loss") == values(whole, "train/loss")
    expected, found = tensors_in(whole.latest_checkpoint), tensors_in(killed.latest_checkpoint)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_run_whose_processes_are_killed_starts_again_and_ends_as_if_nothing_had_happened(root, common, tmp_path):
    assert_kills_leave_no_trace(root, common, tmp_path, ranks=2, times=2, length=24)


@pytest.mark.slow
def test_kills_on_two_nodes_leave_no_trace(root, common, tmp_path):
    assert_kills_leave_no_trace(root, common, tmp_path, ranks=4, times=4, length=40, nodes=2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_twenty_kills_of_four_processes_leave_no_trace(root, common, tmp_path, engine):
    assert_kills_leave_no_trace(root, common, tmp_path, 4, times=20, length=120, engine=[f"train.parallel={engine}"])
