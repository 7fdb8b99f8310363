"""What goes wrong around a run: bad batches, jumping losses, full disks, broken readers, clocks that jump."""

import errno
import json
import logging
import os
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from pretrain.checkpoint.directory import newest_good
from pretrain.checkpoint.manager import read_rollbacks
from pretrain.checkpoint.saver import NotSaved, Saver
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import JsonLinesFile
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.training import run as training_run
from pretrain.training.guards import NEEDED, WINDOW, Guards, Verdict
from pretrain.training.train_step import StepResult, TrainStep
from pretrain.training.trainer import Trainer
from tests.parallel_runs import TINY, spawn, whole_tensors
from tests.tiny_runs import losses

ALONE = World(0, 1, torch.device("cpu"))
RUN = [*TINY, "train.steps=12", "train.checkpoint_every=4", "train.dtype=float32", "train.sample_tokens=0"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def overrides(root, prepared, tmp_path):
    data = [f"data.paths=[{root / 'optim'}]", f"data.root={prepared}"]
    return lambda *given: [*RUN, *data, f"run.root={tmp_path}", "run.name=run", *given]


class Quiet(StopRequest):
    """Asked to stop in step ``step``, if any; listens to no signal."""

    def __init__(self, step=0):
        super().__init__()
        self.left = step

    def listen(self):
        pass

    def __bool__(self):
        self.left -= 1
        return self.left == 0


def train(overrides, stop=None, trainer=Trainer):
    """Run as the command does; returns the folder and the trainer's tensors at the end."""
    config, kept = load(overrides), []

    class Kept(trainer):
        def __init__(self, *given):
            super().__init__(*given)
            kept[:] = [self]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "Trainer", Kept)
        training_run.train_to_end(config, ALONE, ready(config, 1), Quiet() if stop is None else stop)
    return RunFolder(config), whole_tensors(kept[0].model, kept[0].optim)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def alerts(caplog):
    """The titles of the alerts among the log lines."""
    return [record.alert for record in caplog.records if hasattr(record, "alert")]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def spoil(monkeypatch, step, spoil_loss, ranks=(0,)):
    """In ``step`` (from 1) the loss is what ``spoil_loss`` makes of it, and if that is NaN, so is the gradient."""
    train_step, accumulate, at = Trainer.train_step, TrainStep.accumulate, []

    def noting(self, number):
        at[:] = [number + 1]
        return train_step(self, number)

    def spoiled(self, micro_batches, count=None, step_=False, **named):
        nats = accumulate(self, micro_batches, count, named.get("step", step_))
        if at == [step] and self.world.rank in ranks:
            nats = spoil_loss(nats)
            if nats.isnan():
                self.model.lm_head.weight.grad.fill_(float("nan"))
        return nats

    monkeypatch.setattr(Trainer, "train_step", noting)
    monkeypatch.setattr(TrainStep, "accumulate", spoiled)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step_and_its_documents(overrides, monkeypatch, prepared):
    spoil(monkeypatch, 5, lambda nats: nats * float("nan"))
    with pytest.raises(FloatingPointError) as error:  # noticed when the next checkpoint is due
        train(overrides("train.log_every=100"))
    assert "at step 8, not finite since step 5" in str(error.value)
    folder = RunFolder(load(overrides()))
    (line,) = lines_of(folder.bad_batches_file)
    assert line["step"] == 5 and line["what"].startswith("stopped") and line["loss"] == "nan"
    assert line["documents"] and all(name.endswith(".py") for name in line["documents"])
    assert line["documents"][0] in str(error.value) and "the newest checkpoint: " in str(error.value)
    assert newest_good(folder.checkpoints)[0].name == "step-00000004"


def test_a_skipped_update_changes_nothing_and_is_counted_also_over_a_resume(overrides, monkeypatch, caplog):
    spoil(monkeypatch, 6, lambda nats: nats * float("nan"))
    whole, expected = train(overrides("run.name=whole", "train.non_finite=skip"))
    assert alerts(caplog) == ["Step skipped"]
    assert losses(whole)[6] is None and all(torch.isfinite(t).all() for t in expected.values())
    assert [x["train/skipped"] for x in lines_of(whole.metrics_file) if "train/loss" in x] == [0] * 5 + [1] * 7
    assert [line["step"] for line in lines_of(whole.bad_batches_file)] == [6]
    train(overrides("train.non_finite=skip"), Quiet(7))
    folder, resumed = train(overrides("train.non_finite=skip"))
    assert losses(folder) == losses(whole)
    assert_equal(resumed, expected)
    with pytest.raises(ConfigError, match="steps are made before all gradients are known"):
        check(load(overrides("train.non_finite=skip", "train.step_in_backward=true", "optim.clip=0")))


def _skipping(overrides, rank, size):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, 6, lambda nats: nats * float("inf"), ranks=(1,))
        config = load(overrides)
        trainer = Trainer(config, World(rank, size, ALONE.device), ready(config, size), RunFolder(config), Quiet())
        trainer.fit()
        return trainer.guards.skipped, whole_tensors(trainer.model, trainer.optim)


def test_too_many_in_a_row_end_the_run(overrides, monkeypatch):
    accumulate = TrainStep.accumulate
    monkeypatch.setattr(TrainStep, "accumulate", lambda *given, **named: accumulate(*given, **named) * float("nan"))
    with pytest.raises(FloatingPointError, match="11 steps in a row, up to step 11"):
        train(overrides("train.non_finite=skip"))


def test_a_spike_is_above_a_multiple_of_the_median_of_the_latest_losses(tmp_path):
    batches = SimpleNamespace(documents=lambda step: [])
    folder = SimpleNamespace(bad_batches_file=tmp_path / "bad.jsonl")
    guards = Guards(load(["train.spike_factor=2"]).train, ALONE, batches, folder, rollbacks=[])

    def is_spike(loss):
        result = StepResult(torch.tensor(loss, dtype=torch.float64), torch.ones(()), targets=1)
        return guards.judge(1, result, reduce=False) is Verdict.ROLL_BACK

    guards.resume(0, range(1, NEEDED))
    assert not is_spike(9.0)  # too few losses to compare with
    assert is_spike(9.01) and not is_spike(9.0)  # the median of 1 … 7 and 9 is 4.5
    guards.resume(0, [20.0] * (WINDOW + 3))
    assert is_spike(40.1) and not is_spike(40.0) and list(guards.losses) == [20.0] * (WINDOW - 1) + [40.0]


@pytest.mark.parametrize(("at", "back_to"), [(10, 8), (11, 8)])
def test_a_jump_of_the_loss_goes_back_and_passes_over_the_batch_also_over_a_resume(
    overrides, monkeypatch, caplog, at, back_to
):
    spoil(monkeypatch, at, lambda nats: nats * 50)
    spiky = ["train.spike_factor=3", "train.steps=14"]
    with caplog.at_level(logging.WARNING):
        whole, expected = train(overrides("run.name=whole", *spiky))
    assert f"at step {at}, whose batch has" in caplog.text and "going back to the newest checkpoint" in caplog.text
    assert alerts(caplog) == ["Rolled back", "Step skipped"]
    found = losses(whole)
    assert list(found) == list(range(1, 15)) and found[at] is None
    assert read_rollbacks(whole.rollbacks_file) == [at] and [
        line["step"] for line in lines_of(whole.bad_batches_file)
    ] == [at]
    assert (whole.path / f"metrics.after-step-{back_to}.jsonl").exists()
    # Stopped right after it went back, and again: the same run.
    train(overrides(*spiky), Quiet(at + 1))
    folder, resumed = train(overrides(*spiky))
    assert losses(folder) == found
    assert_equal(resumed, expected)
    none, _ = train(overrides("run.name=none", "train.spike_factor=3", "train.most_rollbacks=0"))
    assert None not in losses(none).values() and not none.rollbacks_file.exists()


def failing_at(step, fault, cure=lambda: None, after=100):
    """A trainer at whose ``step`` there is a ``fault``, which ``cure`` ends ``after`` so many steps."""

    class Failing(Trainer):
        def train_step(self, number):
            result = super().train_step(number)
            if number + 1 == step:
                self.checkpoints.wait()
                fault()
            if number + 1 == step + after:
                self.checkpoints.wait()
                cure()
            return result

    return Failing


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB, with ways to fill it and to make room again."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]).returncode:
        pytest.skip("only root can mount a small disk here")
    ballast = place / "ballast"

    def fill():
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    yield place, fill, ballast.unlink
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_costs_the_save_and_nothing_else(overrides, small_disk, caplog):
    place, fill, make_room = small_disk
    whole, expected = train(overrides("run.name=whole"))
    with caplog.at_level(logging.WARNING):
        folder, tensors = train(overrides(f"run.root={place}"), trainer=failing_at(6, fill, make_room, after=3))
    path = folder.checkpoints / "step-00000008"
    assert f"{path} was not saved (the disk is full: " in caplog.text and "bytes needed, 0 free" in caplog.text
    assert "metrics.jsonl cannot be written" in caplog.text and "the run continues and keeps the lines" in caplog.text
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["latest", "step-00000004", "step-00000012"]
    assert losses(folder) == losses(whole)
    assert_equal(tensors, expected)


def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_last_checkpoint(overrides, small_disk):
    place, fill, make_room = small_disk
    where = overrides(f"run.root={place}")
    with pytest.raises(NotSaved, match=r"step-00000012 was not saved .* bytes needed, 0 free, \d+ missing"):
        train(where, trainer=failing_at(6, fill))
    assert newest_good(place / "run" / "checkpoints") == (place / "run" / "checkpoints" / "step-00000004", [])
    make_room()
    folder, tensors = train(where)
    whole, expected = train(overrides("run.name=whole"))
    assert losses(folder) == losses(whole)
    assert_equal(tensors, expected)


@contextmanager
def cut_off(self, path, mode):
    """A file that takes nothing more after a few bytes, as the disk is full."""
    with path.open(mode) as stream:
        stream.write(b"only this")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    yield stream


def _save_where_one_cannot(folder, rank, size):
    world, tensors = World(rank, size, ALONE.device), {f"model.{i}": torch.full((64,), float(i)) for i in range(4)}
    saving = Saver(folder, world)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(filesystem.FileSystem, "create_stream", cut_off)
        saving.save(1, tensors, {"step": 1})
        with pytest.raises(NotSaved) as error:
            saving.finish()
    world.barrier()  # the main process has tidied up
    left = sorted(p.name for p in folder.iterdir())
    world.barrier()
    saving.save(2, tensors, {"step": 2})
    saving.finish()
    return str(error.value), left


def test_processes_skip_and_save_together(overrides, tmp_path):
    """A loss that is inf on one of two; then a disk that is full for one of them."""
    ready(load(overrides()), 2)
    folder = tmp_path / "checkpoints"
    calls = [(_skipping, overrides("train.non_finite=skip")), (_save_where_one_cannot, folder)]
    skipped, saved = spawn(2, tmp_path, calls)
    assert [count for count, _ in skipped] == [1, 1]
    assert_equal(skipped[0][1], skipped[1][1])
    for message, left in saved:
        assert "step-00000001 was not saved (the disk is full" in message and left == []
    assert newest_good(folder) == (folder / "step-00000002", [])
    assert len(list((folder / "step-00000002").glob("*.safetensors"))) == 2


def test_lines_that_the_disk_does_not_take_are_kept_and_written_later(tmp_path, caplog):
    lines = JsonLinesFile(tmp_path / "gone" / "metrics.jsonl")
    for step in (1, 2):
        lines.write({"step": step})
    assert caplog.text.count("cannot be written") == 1
    lines.path.parent.mkdir()
    lines.write({"step": 3})
    assert [line["step"] for line in lines_of(lines.path)] == [1, 2, 3]


def test_a_clock_that_jumps_back_changes_nothing(overrides, monkeypatch):
    whole, expected = train(overrides("run.name=whole"))
    now = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    train(overrides(), Quiet(7))
    os.utime(RunFolder(load(overrides())).checkpoints / "step-00000004", (2e9, 2e9))  # the older one is from the future
    folder, tensors = train(overrides())
    assert losses(folder) == losses(whole)
    assert_equal(tensors, expected)
    rates = [x["perf/tokens_per_s"] for x in lines_of(folder.metrics_file) if "train/loss" in x]
    assert all(rate > 0 for rate in rates)
    assert 0 < json.loads(folder.summary_file.read_text())["wall_seconds"] < 600


@pytest.mark.parametrize("fault", ["cut short", "unreadable"])
def test_a_shard_that_cannot_be_read_ends_the_run_with_its_name_and_loses_nothing(overrides, fault, tmp_path):
    where = overrides(f"data.root={tmp_path / 'own'}")
    whole, expected = train([*where, "run.name=whole"])
    (shard,) = (tmp_path / "own").glob("*/train-00000.bin")
    content = shard.read_bytes()

    def unreadable(*given):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        fail = (
            partial(patch.setattr, os, "preadv", unreadable)
            if fault == "unreadable"
            else partial(os.truncate, shard, 0)
        )
        with pytest.raises((OSError, ValueError)) as error:
            train(where, trainer=failing_at(9, fail))
    said = f"{shard} is shorter than it was" if fault == "cut short" else f"Input/output error: '{shard}'"
    assert said in str(error.value)
    assert newest_good(RunFolder(load(where)).checkpoints)[0].name == "step-00000008"
    shard.write_bytes(content)
    folder, tensors = train(where)
    assert losses(folder) == losses(whole)
    assert_equal(tensors, expected)
