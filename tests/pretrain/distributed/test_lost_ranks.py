"""Processes that differ, and processes that wait for one that is stuck or dead."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from optim.scores import require_agreement
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.setup.rank_agreement import Disagreement, require_same_setting, require_same_weights
from pretrain.training.trainer import Trainer
from tests.parallel_runs import CPU, TINY, spawn


@pytest.fixture
def common(root, tmp_path):
    """Overrides of a tiny run on a few of the project's own files."""
    text = [f"data.paths=[{root / 'models'},{root / 'optim'}]", f"data.root={tmp_path / 'prepared'}"]
    return [*TINY, *text, f"run.root={tmp_path / 'runs'}", "run.name=one"]


def disagreement(require, *arguments):
    try:
        require(*arguments)
    except Disagreement as error:
        return str(error)
    return None


def setting_of_rank_1(overrides, settings, corpus, version, rank, size):
    """The messages on this rank when rank 1 has other settings, another corpus or another torch."""
    own, prepared = ([*overrides, *settings], [*overrides, *corpus]) if rank == 1 else (overrides, overrides)
    there, torch.__version__ = torch.__version__, version if rank == 1 and version else torch.__version__
    try:
        return disagreement(require_same_setting, load(own), ready(load(prepared), size), World(rank, size, CPU))
    finally:
        torch.__version__ = there


def weights_of_rank_1(overrides, rank, size):
    """The messages about a tensor that rank 1 has changed, about shards (none), and about a complete model."""
    world, mesh = World(rank, size, CPU), init_device_mesh("cpu", (2,))
    sharded = {"w": distribute_tensor(torch.arange(6.0).view(2, 3), mesh, [Shard(0)])}
    changed = {"norm.weight": torch.ones(3), "w": torch.zeros(2, dtype=torch.bfloat16) + rank}
    config = load([*overrides, f"train.seed={rank}"])
    return [
        disagreement(require_same_weights, sharded, world),
        disagreement(require_same_weights, changed, world),
        disagreement(Trainer, config, world, ready(config, size), RunFolder(config), StopRequest()),
    ]


def choice_of_rank_1(chosen, rank, size):
    """The message when rank 1 has selected the rows ``chosen`` of the second layer, and rank 0 the rows 0 and 2."""
    indices = [torch.tensor([1, 3]), torch.tensor(chosen if rank == 1 else [0, 2])]
    try:
        require_agreement(indices, CPU)
    except RuntimeError as error:
        return str(error)
    return None


def test_differences_between_processes_are_named_before_any_compute(common, tmp_path):
    ready(load(common), 2)
    ready(load([*common, "data.seed=1"]), 2)
    elsewhere = f"data.root={tmp_path / 'elsewhere'}"
    cases = [
        ([], [], None),
        ([elsewhere], [elsewhere], None),
        (["optim.lr=0.5", "train.steps=7"], [], None),
        ([], ["data.seed=1"], None),
        ([], [], "2.12.0+cpu"),
    ]
    calls = [(setting_of_rank_1, common, *case) for case in cases]
    calls += [(weights_of_rank_1, common), (choice_of_rank_1, [0, 2]), (choice_of_rank_1, [0, 3])]
    alike, moved, settings, data, version, weights, agreed, apart = spawn(2, tmp_path, calls)
    assert alike == moved == (None, None)
    for both in (settings, data, version):
        assert both[0] == both[1]
    assert settings[0].splitlines()[1:-1] == [
        f"optim.lr: {load(common).optim.lr} on rank 0; 0.5 on rank 1",
        "train.steps: 30 on rank 0; 7 on rank 1",
    ]
    tokenizer, tokens = data[0].splitlines()[1:-1]
    assert re.fullmatch(r"tokenizer: [0-9a-f]{64} on rank 0; [0-9a-f]{64} on rank 1", tokenizer)
    assert tokens.startswith("data: ")
    assert version[0].splitlines()[1:-1] == [f"torch: {torch.__version__} on rank 0; 2.12.0+cpu on rank 1"]
    shards, changed, trainer = weights[0]
    assert shards is None
    assert "different initial values of 1 tensors\nw: " in changed
    assert agreed == (None, None) and apart == ("the processes chose different rows: their scores or seeds differ",) * 2
    assert "model.embed_tokens.weight: " in trainer and not RunFolder(load(common)).config_file.exists()


class Pair:
    """Two processes of one run, without a launcher, which would end one process when the other dies."""

    def __init__(self, root, overrides):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.metrics = RunFolder(load(overrides)).metrics_file
        self.folder = RunFolder(load(overrides))
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "pretrain.train", *overrides],
                cwd=root,
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
                | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def after(self, step):
        """Wait until a step is logged."""
        deadline = time.monotonic() + 120
        while not self.metrics.exists() or len(self.metrics.read_text().splitlines()) < step:
            assert time.monotonic() < deadline and self.processes[0].poll() is None
            time.sleep(0.05)
        return self.processes

    def end_of_first(self):
        """The exit code and the last line of rank 0."""
        _, err = self.processes[0].communicate(timeout=120)
        return self.processes[0].returncode, err.splitlines()[-1]


@pytest.fixture
def pair(root, common):
    pair = Pair(root, [*common, "train.steps=100000", "train.timeout_minutes=0.2", "logger.wandb.mode=disabled"])
    yield pair
    for process in pair.processes:
        process.kill()
        process.communicate()


def test_a_process_that_is_stuck_is_named_by_the_one_that_waits_for_it(pair):
    pair.after(3)[1].send_signal(signal.SIGSTOP)
    code, last = pair.end_of_first()
    assert code == 3
    assert re.match(r"error: rank 0 waited in vain in gloo:\w+\(\w+ \[\d*\]\): no answer from rank 1; ", last), last
    assert "train.timeout_minutes=0.2" in last and "Timed out waiting 12000ms" in last


@pytest.mark.slow
def test_a_process_asked_to_end_after_another_died_ends_without_saving(pair):
    first, second = pair.after(3)
    second.kill()
    first.terminate()
    began = time.monotonic()
    code, last = pair.end_of_first()
    assert code == 3 and time.monotonic() - began < 15
    assert "rank 0 was asked to end while it waited in gloo:" in last or "no answer from rank 1" in last
    assert pair.folder.latest_checkpoint is None
    assert all(json.loads(line) for line in pair.metrics.read_text().splitlines())


def test_a_timeout_must_be_some_time(common):
    with pytest.raises(ConfigError, match=r"train\.timeout_minutes=0\.0 must be greater than 0"):
        check(load([*common, "train.timeout_minutes=0"]))
