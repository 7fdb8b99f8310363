"""Checkpoints on disk: damage is found, the checkpoint before is used, and nothing else is removed."""

import json
import logging
import pickle
import random
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.directory import MANIFEST, Damaged, newest_good, path_of
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saver import Saver
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.inference.pretrained import load_pretrained
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer
from tests.parallel_runs import TINY

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def overrides(root, tmp_path_factory):
    """Overrides of a tiny run below a folder of this file's own."""
    here = tmp_path_factory.mktemp("runs")
    more = ["train.steps=8", "train.checkpoint_every=4", "train.dtype=float32", "train.sample_tokens=0"]
    data = [f"data.paths=[{root / 'optim'}]", f"data.root={here / 'prepared'}"]
    return lambda *given: [*TINY, *more, *data, f"run.root={here}", *given]


def train(overrides, trainer=Trainer):
    config = load(overrides)
    folder = RunFolder(config)
    with folder.locked():
        trainer = trainer(config, ALONE, ready(config, 1), folder, StopRequest())
        trainer.fit()
    return folder, trainer


def steps_in(folder):
    return sorted(int(p.name.removeprefix("step-")) for p in folder.checkpoints.glob("step-????????"))


@pytest.fixture(scope="module")
def finished(overrides):
    """The folder of a run with checkpoints of steps 4 and 8."""
    return train(overrides("run.name=finished"))[0]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged; returns its folder and overrides that go on with it."""
    shutil.copytree(finished.path, tmp_path / "finished", symlinks=True)
    return tmp_path / "finished", [f"run.root={tmp_path}", "run.name=finished"]


def damage(folder, draw):
    """Flip a bit, cut off some of, or remove a file of ``folder``; returns the file."""
    file = draw.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    what = draw.choice(["flip", "flip", "truncate", "remove"])
    place = draw.randrange(len(content))
    if what == "flip":
        content[place] ^= 1 << draw.randrange(8)
    if what == "remove":
        file.unlink()
    else:
        file.write_bytes(content if what == "flip" else content[:place])
    return file


def test_whatever_happens_to_a_file_is_seen_and_the_checkpoint_before_is_used(copied):
    folder = copied[0] / "checkpoints"
    newest, draw, seen = path_of(folder, 8), random.Random(0), {"fell back": 0, "refused": 0, "harmless": 0}
    whole = {file: file.read_bytes() for file in newest.iterdir()}
    assert newest_good(folder) == (newest, [])
    for _ in range(400):
        file = damage(newest, draw)
        try:
            found, damaged = newest_good(folder)
        except ValueError as error:  # of a format of its own: it may be one of a newer version
            assert "format" in str(error) and str(newest) in str(error)
            seen["refused"] += 1
        else:
            if found == newest:  # a space became another one
                assert file.name == MANIFEST and json.loads(file.read_text()) == json.loads(whole[file])
                seen["harmless"] += 1
            else:
                assert found == path_of(folder, 4) and [error.path for error in damaged] == [newest]
                seen["fell back"] += 1
        file.write_bytes(whole[file])
    assert seen["fell back"] >= 390 and seen["harmless"] < 5


def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(copied, overrides, finished, caplog):
    path, where = copied
    tensors = next(path_of(path / "checkpoints", 8).glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        folder, trainer = train(overrides(*where))
    assert f"{tensors.parent} is damaged ({tensors.name} has" in caplog.text
    assert "renamed it to step-00000008.damaged" in caplog.text and "resuming from step 4" in caplog.text
    assert trainer.step == 8
    again, before = (load_file(next(path_of(f.checkpoints, 8).glob("*.safetensors"))) for f in (folder, finished))
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert {p.name for p in folder.checkpoints.iterdir()} == {
        "latest", "step-00000004", "step-00000008", "step-00000008.damaged",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"step-00000008.damaged is damaged"):
        load_pretrained(folder.checkpoints / "step-00000008.damaged")


def test_latest_is_put_right_where_a_kill_came_before_it_moved(copied, overrides):
    path, where = copied
    (path / "checkpoints" / "latest").unlink()
    (path / "checkpoints" / "latest").symlink_to("step-00000004")
    folder, _ = train(overrides(*where))
    assert (folder.checkpoints / "latest").readlink().name == "step-00000008"


def test_where_none_is_good_the_run_is_refused_and_nothing_moves(copied, overrides):
    path, where = copied
    for step in (4, 8):
        (path_of(path / "checkpoints", step) / "state.json").unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"no checkpoint of this run is intact:\n.*00000008 is damaged \(state.json"):
        train(overrides(*where, "train.steps=12"))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    for step in (4, 8):
        shutil.rmtree(path_of(path / "checkpoints", step))
    with pytest.raises(ValueError, match=r"had the checkpoint step-00000008, which is missing; restore one"):
        train(overrides(*where, "train.steps=12"))


@pytest.mark.parametrize(("every", "background"), [(1, True), (2, True), (3, True), (4, True), (4, False)])
def test_a_kill_costs_at_most_an_interval_and_the_steps_made_during_a_save(overrides, monkeypatch, every, background):
    """On the slowest disk there is, whose saves end only when training waits for them: an interval later."""
    waited_for, put, end, costs = threading.Event(), Saver._put_in_place, Saver._end, []

    def put_late(saver, *given):
        assert not saver.background or waited_for.wait(60)
        put(saver, *given)

    def waiting(saver):
        waited_for.set()
        try:
            return end(saver)
        finally:
            waited_for.clear()

    class Noting(Trainer):
        def train_step(self, number):
            result = super().train_step(number)
            costs.append(number + 1 - max(steps_in(self.folder), default=0))
            return result

    monkeypatch.setattr(Saver, "_put_in_place", put_late)
    monkeypatch.setattr(Saver, "_end", waiting)
    way = f"train.async_save={str(background).lower()}"
    name = f"run.name=slow-{every}-{background}"
    folder, _ = train(overrides(name, "train.steps=14", f"train.checkpoint_every={every}", way), Noting)
    assert max(costs) == (2 * every if background and every > 1 else every)
    assert steps_in(folder) == sorted({*range(every, 15, every), 14})


def test_a_checkpoint_of_a_newer_version_is_refused_and_left_where_it_is(copied, overrides):
    path, where = copied
    manifest = path_of(path / "checkpoints", 8) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match="has checkpoint format 3; this version reads format 2"):
        train(overrides(*where, "train.steps=12"))
    assert manifest.exists()


def test_only_what_keep_last_and_keep_every_leave_out_is_removed(overrides):
    folder, _ = train(
        overrides(
            "run.name=kept", "train.steps=14", "train.checkpoint_every=2", "train.keep_last=2", "train.keep_every=6"
        )
    )
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == [
        "latest",
        *(f"step-000000{n:02}" for n in (6, 12, 14)),
    ]
    with pytest.raises(ConfigError, match=r"train.keep_every has no effect if train.keep_last=0 keeps all"):
        check(load(overrides("train.keep_every=6")))


def test_pruning_keeps_the_newest_and_multiples(tmp_path):
    def left(*steps, keep_last=0, keep_every=0):
        shutil.rmtree(tmp_path)
        for step in steps:
            path_of(tmp_path, step).mkdir(parents=True)
        prune(tmp_path, keep_last, keep_every)
        return sorted(int(p.name.removeprefix("step-")) for p in tmp_path.iterdir())

    assert left(4, 6, 8) == [4, 6, 8]
    assert left(4, 8, 12, keep_last=1) == [12]
    assert left(4, 8, 12, 14, keep_last=2) == [12, 14]
    assert left(4, 8, 12, 16, keep_last=1, keep_every=8) == [8, 16]


def test_a_fault_is_the_same_after_a_trip_to_another_process(tmp_path):
    error = pickle.loads(pickle.dumps(Damaged(tmp_path, "state.json is missing")))
    assert (error.path, error.what) == (tmp_path, "state.json is missing") and str(tmp_path) in str(error)
