"""Checkpoints on the disk: what is damaged is seen, the one before is used, nothing else is removed, old ones load."""

import gc
import json
import logging
import random
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.directory import HALF_WAY, MANIFEST, is_half_way, newest_good, path_of, prune
from pretrain.checkpoint.saver import Saver
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load, to_config
from pretrain.config.schema import ConfigError
from pretrain.distributed.world import World
from pretrain.inference.pretrained import find_pretrained, load_pretrained
from pretrain.runs.folder import RunFolder
from pretrain.setup.checks import check
from pretrain.setup.data import ready
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
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
    assert "it is now step-00000008.damaged" in caplog.text and "going on from step 4" in caplog.text
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
    with pytest.raises(ValueError, match=r"no checkpoint of this run is good:\n.*00000008 is damaged \(state.json"):
        train(overrides(*where, "train.steps=12"))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    for step in (4, 8):
        shutil.rmtree(path_of(path / "checkpoints", step))
    with pytest.raises(ValueError, match=r"held step-00000008, which is gone; bring a good one back"):
        train(overrides(*where, "train.steps=12"))


@pytest.mark.parametrize(("every", "background"), [(1, True), (2, True), (3, True), (4, True), (4, False)])
def test_no_kill_costs_more_than_an_interval_however_slow_the_disk_is(overrides, monkeypatch, every, background):
    """On the slowest of all disks, which is done with nothing before somebody waits for it."""
    waited_for, put, end, costs, listed = threading.Event(), Saver._put_in_place, Saver._end, [], []

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
        def _step_and_log(self, number):
            super()._step_and_log(number)
            steps = steps_in(self.folder)
            costs.append(self.step - max(steps, default=0))
            listed.append([step for step in steps if step % every])

    monkeypatch.setattr(Saver, "_put_in_place", put_late)
    monkeypatch.setattr(Saver, "_end", waiting)
    way = f"train.async_save={str(background).lower()}"
    name = f"run.name=slow-{every}-{background}"
    folder, _ = train(overrides(name, "train.steps=14", f"train.checkpoint_every={every}", way), Noting)
    assert max(costs) == every
    assert max(map(len, listed)) == (1 if background and every > 1 else 0)
    assert steps_in(folder) == sorted({*range(every, 15, every), 14})


def test_a_half_way_checkpoint_goes_when_a_newer_one_is_there_and_counts_for_nothing(tmp_path):
    def left(*steps, keep_last=0, keep_every=0):
        """Which stay of these; those of steps with a half are half-way."""
        shutil.rmtree(tmp_path)
        for step in steps:
            path_of(tmp_path, int(step)).mkdir(parents=True)
            if step != int(step):
                (path_of(tmp_path, int(step)) / HALF_WAY).touch()
        prune(tmp_path, keep_last, keep_every)
        return sorted(int(p.name.removeprefix("step-")) for p in tmp_path.iterdir())

    assert left(4, 6.5, 8) == [4, 8]
    assert left(4, 8, 10.5) == [4, 8, 10]
    assert left(4, 6.5, 8, 10.5, 12) == [4, 8, 12]
    assert left(4, 8, 10.5, keep_last=1) == [8, 10]
    assert left(4, 8, 10.5, 12, keep_last=1) == [12]
    assert left(4, 8, 10.5, 12, 14.5, keep_last=2) == [8, 12, 14]
    assert left(4, 6.5, 8, 12, 16, keep_last=1, keep_every=8) == [8, 16]


def test_a_half_way_checkpoint_is_gone_on_from_and_what_a_kill_left_of_them_goes(copied, overrides, finished):
    path, where = copied

    class Killed(Trainer):
        def _half_way(self):
            if super()._half_way() and self.step == 10:
                self.save(half_way=True)
                self.saver.finish()
                raise KeyboardInterrupt
            return False

    with pytest.raises(KeyboardInterrupt):
        train(overrides(*where, "train.steps=12"), Killed)
    assert (path / "checkpoints" / "latest").readlink().name == "step-00000010"
    assert find_pretrained(path).path.name == "step-00000008"  # as the run may go on, and take the other away
    early, _ = train(overrides(*where, "train.steps=10"))  # an end that is saved already stays
    assert find_pretrained(early.path).path.name == "step-00000010" and not is_half_way(path_of(early.checkpoints, 10))
    left = path_of(path / "checkpoints", 6)  # by a kill before it could be removed
    shutil.copytree(path_of(path / "checkpoints", 10), left)
    (left / HALF_WAY).touch()
    folder, _ = train(overrides(*where, "train.steps=12"))
    shutil.copytree(finished.path, path / "whole" / "finished", symlinks=True)
    whole, _ = train(overrides(f"run.root={path / 'whole'}", "run.name=finished", "train.steps=12"))
    assert steps_in(folder) == [4, 8, 10, 12] and steps_in(whole) == [4, 8, 12]
    ours, theirs = (load_file(next(path_of(f.checkpoints, 12).glob("*.safetensors"))) for f in (folder, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_a_newer_version_is_refused_and_left_where_it_is(copied, overrides):
    path, where = copied
    manifest = path_of(path / "checkpoints", 8) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match="has checkpoint format 3; this version reads formats 1 to 2"):
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
    with pytest.raises(ConfigError, match=r"train.keep_every adds to train.keep_last, which keeps all"):
        check(load(overrides("train.keep_every=6")))


def test_a_checkpoint_of_format_1_still_loads(root, tmp_path):
    """Written by the version of 2026-11-24 (d1f8099), before there were manifests; safetensors itself is the oracle."""
    kept = root / "tests" / "data" / "format-1"
    path = path_of(kept / "checkpoints", 2)
    config = load_kept(kept, tmp_path)
    assert newest_good(kept / "checkpoints") == (path, [])
    model = build_model(config, ALONE.device)
    optim = build_optimizer(config, model)
    checkpoint.load(path, model, optim)
    (file,) = path.glob("*.safetensors")
    found, stored = checkpoint.tensors_of(model, optim), load_file(file)
    assert found.keys() == stored.keys() and len(stored) > 40
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    copy = tmp_path / "kept" / "checkpoints"
    shutil.copytree(path, copy / path.name)
    (cut,) = copy.glob("*/*.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"no checkpoint of this run is good"):
        newest_good(copy)


def load_kept(kept: Path, tmp_path: Path):
    """The configuration of the kept run, as today's version composes it."""
    from omegaconf import OmegaConf

    old = OmegaConf.load(kept / "config.yaml")
    old.optim.state_dtype = old.train.dtype  # what null meant then
    base = OmegaConf.structured(load(["data=text", "data.paths=[.]", f"run.root={tmp_path}"]))
    return to_config(OmegaConf.merge(base, {key: old[key] for key in ("model", "optim", "train")}))


class OnAGpu(World):
    """A process of a device that is not there; notes the threads that take it."""

    def use_device(self):
        self.__dict__.setdefault("threads", []).append(threading.current_thread())


class CopyingStager:
    """Torch's stager on a CPU: with ``once`` it can be used once, as in torch 2.11."""

    made, once = [], False

    def __init__(self, options):
        self.pinned, self.uses, self.closed = options.use_pinned_memory, 0, False
        self.made.append(self)

    def stage(self, tensors):
        if self.uses and self.once:
            raise KeyError(type)
        self.uses += 1
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def close(self):
        self.closed = True


@pytest.fixture
def stagers(monkeypatch):
    monkeypatch.setattr("pretrain.checkpoint.saver.DefaultStager", CopyingStager)
    monkeypatch.setattr(CopyingStager, "made", [])
    return CopyingStager


@pytest.mark.parametrize("once", [True, False])
def test_pinned_memory_is_used_again_where_torch_s_stager_can_be(tmp_path, stagers, monkeypatch, once):
    monkeypatch.setattr(stagers, "once", once)
    saver = Saver(tmp_path, OnAGpu(0, 1, torch.device("cuda", 1)))
    for step in (1, 2, 3):
        saver.save(step, {"model.x": torch.full((4,), step)}, {})
        saver.finish()
        assert load_file(next(path_of(tmp_path, step).glob("*.safetensors")))["model.x"].tolist() == [step] * 4
    used = [(stager.uses, stager.closed) for stager in stagers.made if stager.pinned]
    assert used == ([(1, True)] * 3 if once else [(3, False)])


def test_the_thread_that_saves_takes_its_device_before_anything_else(tmp_path, stagers, monkeypatch):
    world, threads = OnAGpu(0, 1, torch.device("cuda", 1)), []
    monkeypatch.setattr("pretrain.checkpoint.saver._require_finite", lambda *_: threads.append(list(world.threads)))
    saver = Saver(tmp_path, world)
    saver.save(1, {"model.x": torch.ones(4)}, {})
    thread = saver._thread
    saver.finish()
    assert threads == [[thread]]


def test_a_process_takes_its_own_device_and_a_cpu_needs_none(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    ALONE.use_device()
    World(1, 2, torch.device("cuda", 1)).use_device()
    assert taken == [torch.device("cuda", 1)]


def test_the_copies_of_a_cpu_go_with_their_save(tmp_path, monkeypatch):
    copies, write = [], Saver._write

    def note(saver, path, tensors, *rest):
        copies.append(weakref.ref(tensors["model.x"].untyped_storage()))
        write(saver, path, tensors, *rest)

    monkeypatch.setattr(Saver, "_write", note)
    saver = Saver(tmp_path, ALONE)
    gc.disable()
    try:
        saver.save(1, {"model.x": torch.ones(4)}, {})
        saver.finish()
        assert [copy() for copy in copies] == [None]
    finally:
        gc.enable()
