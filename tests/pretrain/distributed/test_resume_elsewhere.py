"""A run resumed on another number of processes, in other micro-batches, has the same rows of tokens and losses."""

import shutil
import zlib

import pytest

from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer
from tests.parallel_runs import CPU, TINY, spawn, values

STOP, STEPS, SIZES = 7, 14, (1, 2, 4)


class Asked(StopRequest):
    """A request to stop that comes during step STOP of a run's first life."""

    left = STOP

    def __bool__(self):
        self.left -= 1
        return self.left == 0


class Noted:
    """Records the rows of inputs of each step."""

    def __init__(self, ahead, rows):
        self.ahead, self.rows = ahead, rows

    def __call__(self, step):
        batches = self.ahead(step)
        self.rows[step] = [zlib.crc32(row.numpy().tobytes()) for inputs, *_ in batches for row in inputs]
        return batches

    def __getattr__(self, name):
        return getattr(self.ahead, name)


def go_on(name, overrides, to_the_end, rank, size):
    """Train as rank of size; returns by step the rows that this process trained on, in their order."""
    config = load([*overrides, f"run.name={name}"])
    folder = RunFolder(config)
    stop = StopRequest() if to_the_end else Asked()
    trainer = Trainer(config, World(rank, size, CPU), ready(config, size), folder, stop)
    rows = {}
    trainer.feed.ahead = Noted(trainer.feed.ahead, rows)
    trainer.fit()
    return rows


def together(by_rank):
    """The rows of all processes by step, in the order of the step's sequences."""
    return {step: [row for rows in by_rank for row in rows[step]] for step in by_rank[0]}


@pytest.mark.slow
def test_the_number_of_processes_and_the_micro_batch_change_neither_rows_nor_losses(root, tmp_path):
    common = [*TINY, f"train.steps={STEPS}", "optim.score=sketch", f"run.root={tmp_path / 'runs'}"]
    common += [f"data.paths=[{root / 'models'}]", f"data.root={tmp_path / 'prepared'}"]
    ready(load([*common, "run.name=none"]), 1)
    micro = {1: 4, 2: 2, 4: 1}  # of 8 sequences a step
    rows = {}
    (tmp_path / "0").mkdir()
    whole = together(spawn(1, tmp_path / "0", [(go_on, "whole", common, True)])[0])
    alone = RunFolder(load([*common, "run.name=whole"]))
    for size in SIZES:
        (tmp_path / f"first-{size}").mkdir()
        rows[size] = together(spawn(size, tmp_path / f"first-{size}", [(go_on, f"from-{size}", common, False)])[0])
    for size in SIZES:
        calls, others = [], [n for n in SIZES if n != size]
        for n in others:
            there = tmp_path / f"to-{size}"
            shutil.copytree(tmp_path / "runs" / f"from-{n}", there / f"from-{n}", symlinks=True)
            there = [*common, f"run.root={there}", f"train.micro_batch_size={micro[size]}"]
            calls.append((go_on, f"from-{n}", there, True))
        (tmp_path / f"then-{size}").mkdir()
        for n, after in zip(others, spawn(size, tmp_path / f"then-{size}", calls), strict=True):
            assert rows[n] | together(after) == whole
            assert list(rows[n]) == list(range(STOP)) and list(together(after)) == list(range(STOP, STEPS))
            on_size = RunFolder(load([*common, f"run.root={tmp_path / f'to-{size}'}", f"run.name=from-{n}"]))
            ours, theirs = values(on_size, "train/loss"), values(alone, "train/loss")
            assert ours.keys() == theirs.keys()
            assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-9  # in float64
