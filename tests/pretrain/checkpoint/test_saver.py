"""The saver: copies in the background, pinned memory, tensors that are not finite, and faults other than the disk's."""

import gc
import threading
import weakref
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import retention, saver
from pretrain.checkpoint.directory import newest_good, path_of
from pretrain.checkpoint.saver import Saver
from pretrain.distributed.world import World
from tests.processes import in_processes

ALONE = World(0, 1, torch.device("cpu"))


def test_a_step_waits_for_the_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    waits, may_write, put = threading.Event(), threading.Event(), Saver._put_in_place
    monkeypatch.setattr(Saver, "_put_in_place", lambda *given: (waits.set(), may_write.wait(30), put(*given)))
    saving, weight = Saver(tmp_path, ALONE), torch.ones(8)
    saving.save(1, {"model.weight": weight}, {"step": 1})
    weight.fill_(2.0)  # the run goes on
    assert waits.wait(30) and [p.name for p in tmp_path.iterdir()] == ["step-00000001.tmp"]
    may_write.set()
    saving.save(2, {"model.weight": weight}, {"step": 2})  # waits for the first
    assert newest_good(tmp_path)[0].name >= "step-00000001"
    saving.finish()
    for step, value in ((1, 1.0), (2, 2.0)):
        (file,) = path_of(tmp_path, step).glob("*.safetensors")
        assert load_file(file)["model.weight"].tolist() == [value] * 8


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saving = Saver(tmp_path, ALONE)
    for step, then in ((1, "starts from the beginning"), (3, "resumes from step-00000002")):
        saving.save(step, {"model.weight": torch.tensor([1.0, float("inf")])}, {"step": step})
        reason = f"step-{step:08d} is not saved, because model.weight is not finite; .* again, which {then}$"
        with pytest.raises(FloatingPointError, match=reason):
            saving.finish()
        saving.save(2, {"model.weight": torch.ones(2)}, {"step": 2})
        saving.finish()
    assert newest_good(tmp_path) == (path_of(tmp_path, 2), [])


def test_what_fails_otherwise_in_a_save_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "seal", lambda *given: 1 / 0)
    saving = Saver(tmp_path, ALONE)
    saving.save(1, {"model.weight": torch.ones(8)}, {"step": 1})
    with pytest.raises(ZeroDivisionError):
        saving.finish()


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
    monkeypatch.setattr(saver, "STAGES_AGAIN", not once)
    saving = Saver(tmp_path, OnAGpu(0, 1, torch.device("cuda", 1)))
    for step in (1, 2, 3):
        saving.save(step, {"model.x": torch.full((4,), step)}, {})
        saving.finish()
        assert load_file(next(path_of(tmp_path, step).glob("*.safetensors")))["model.x"].tolist() == [step] * 4
    used = [(stager.uses, stager.closed) for stager in stagers.made if stager.pinned]
    assert used == ([(1, True)] * 3 if once else [(3, False)])


def test_the_thread_that_saves_takes_its_device_before_anything_else(tmp_path, stagers, monkeypatch):
    world, threads = OnAGpu(0, 1, torch.device("cuda", 1)), []
    monkeypatch.setattr("pretrain.checkpoint.saver._require_finite", lambda *_: threads.append(list(world.threads)))
    saving = Saver(tmp_path, world)
    saving.save(1, {"model.x": torch.ones(4)}, {})
    thread = saving._thread
    saving.finish()
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
    saving = Saver(tmp_path, ALONE)
    gc.disable()
    try:
        saving.save(1, {"model.x": torch.ones(4)}, {})
        saving.finish()
        assert [copy() for copy in copies] == [None]
    finally:
        gc.enable()


def save_twice(rank, folder):
    """Save a step, and save it again when rank 1's view of the folder is old, as on a network's file system."""
    world, exists = World(rank, 2, torch.device("cpu")), type(folder).exists
    saving = Saver(folder / "checkpoints", world, timeout=timedelta(seconds=60))
    for stale in (False, rank == 1):
        type(folder).exists = lambda path, stale=stale: not stale and exists(path)
        saving.save(1, {"model.a": torch.ones(8), "model.b": torch.ones(8)}, {"step": 1})
        saving.wait()
    type(folder).exists = exists
    saving.finish()
    return exists(path_of(folder / "checkpoints", 1))


def test_all_processes_save_or_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert in_processes(2, tmp_path, save_twice, tmp_path) == [True, True]


def test_files_that_a_process_did_not_see_are_no_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Saver, "_checksums", lambda *_: {})
    saving = Saver(tmp_path, ALONE)
    saving.save(1, {"model.weight": torch.ones(8)}, {"step": 1})
    with pytest.raises(saver.NotSaved, match="not all processes see the same files"):
        saving.finish()
    assert newest_good(tmp_path) == (None, [])


def test_an_old_checkpoint_that_stays_does_not_fail_the_new_one(tmp_path, monkeypatch, caplog):
    saving = Saver(tmp_path, ALONE, keep_last=1)
    saving.save(1, {"model.weight": torch.ones(8)}, {"step": 1})
    saving.wait()
    monkeypatch.setattr(retention, "prune", lambda *_: (_ for _ in ()).throw(OSError("busy")))
    saving.save(2, {"model.weight": torch.ones(8)}, {"step": 2})
    saving.finish()
    assert (
        newest_good(tmp_path)[0] == path_of(tmp_path, 2)
        and "could not be moved or older checkpoints could not be deleted" in caplog.text
    )


def test_a_folder_that_cannot_be_flushed_after_its_rename_is_still_a_checkpoint(tmp_path, monkeypatch, caplog):
    def fsync(path):
        if path == tmp_path:
            raise OSError("busy")

    monkeypatch.setattr(saver, "fsync", fsync)
    saving = Saver(tmp_path, ALONE)
    saving.save(1, {"model.weight": torch.ones(8)}, {"step": 1})
    saving.finish()
    assert newest_good(tmp_path)[0] == path_of(tmp_path, 1)
    assert "step-00000001 is complete, but the disk could not be flushed: busy" in caplog.text
