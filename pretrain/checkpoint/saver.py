"""Saving while the run goes on: a step waits for the copy to the host's memory, a thread does the rest.

One save is under way at a time. A checkpoint is written beside its place and renamed once all processes have written
and every file has its checksum; ``latest`` moves last. What the disk refuses is said, cleaned up, and tried again at
the next save: the checkpoints before it are not touched.
"""

import errno
import logging
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from data.atomic import UNFINISHED, fsync
from models.dtensor import local
from pretrain.checkpoint import directory as checkpoint_folder
from pretrain.distributed.world import World

logger = logging.getLogger(__name__)
MUST_BE_FINITE = ("model.", "optim.", "master.")
# What it warns of, being alone, a single process is.
warnings.filterwarnings("ignore", message="torch.distributed is")


class NotSaved(OSError):
    """A checkpoint that the disk did not take; those before it are as they were."""


class Saver:
    """Writes the checkpoints of a run below ``folder``.

    Args:
        background: copy the tensors and go on, or have ``save`` return only when all is written.
        keep_last, keep_every: see ``checkpoint_folder.prune``.
        timeout: how long a process waits for the others in a save.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        background: bool = True,
        keep_last: int = 0,
        keep_every: int = 0,
        timeout: timedelta | None = None,
    ):
        self.folder, self.world, self.background = folder, world, background
        self.keep = keep_last, keep_every
        # A group of its own: the other collectives of the run are not to be mixed with those of a save.
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        # Pinned copies are kept for the next save; a CPU's own memory is not filled twice for longer than a save takes.
        self._on_cuda = world.device.type == "cuda"
        self._stager = _stager(pinned=True) if self._on_cuda and _stages_again() else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the save under way, for the process' own thread to see
        self._lost: NotSaved | None = None  # what was said of the latest save, when that is not on the disk
        self.blocked_seconds = self.seconds = 0.0  # of the latest save: what the step waited, what all of it took

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write ``tensors`` and the JSON-able ``state`` to the checkpoint of ``step``, unless there is one.

        Every process calls it, at the same step, with its own part of ``tensors``.

        Raises:
            FloatingPointError: of the save before: there was a tensor that is not finite.
        """
        self.wait()
        self._lost = None
        path = checkpoint_folder.path_of(self.folder, step)
        if path.exists():
            return
        began = time.perf_counter()
        total = sum(t.numel() * t.element_size() for t in tensors.values())  # a sharded one counts as a whole
        tensors = _share(tensors, self.world)
        if self.background:
            stager = self._stager or _stager(pinned=self._on_cuda)
            tensors = stager.stage(tensors)  # type: ignore[assignment]
            if stager is not self._stager:
                stager.close()  # it is part of a circle of references, which would keep the copies after the save
            # Let go at exit: a run that is told to end at once ends at once.
            self._thread = threading.Thread(target=self._write, args=(path, tensors, state, total), daemon=True)
            self._thread.start()
        else:
            self._write(path, tensors, state, total)
        self.blocked_seconds = time.perf_counter() - began

    def look(self) -> None:
        """Say what became of a save that is done; call after each step.

        Raises:
            FloatingPointError, RuntimeError: it failed by another fault than the disk's.
        """
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """``look`` at the end of the save that is under way."""
        if failure := self._end():
            self._lost = failure
            logger.warning("%s; the run goes on, and the next save is another try", failure)

    def finish(self) -> None:
        """Wait for the latest save.

        Raises:
            NotSaved: it is not on the disk.
        """
        if failure := self._end() or self._lost:
            raise failure

    def _end(self) -> NotSaved | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is None or isinstance(failure, NotSaved):
            return failure
        raise failure

    # What the thread does.

    def _write(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any], total: int) -> None:
        began, temporary = time.perf_counter(), path.with_suffix(UNFINISHED)
        try:
            self.world.use_device()
            self._on_all(lambda: _require_finite(tensors, path))
            self._on_main(lambda: _make_room(temporary, total))
            writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            checksums: dict[str, tuple[int, str]] = {}
            for part in self._on_all(lambda: self._checksums(temporary)):
                checksums |= part
            self._on_main(lambda: self._put_in_place(temporary, path, state, checksums))
            logger.info("saved %s", path)
        except BaseException as error:
            self._failure = self._explained(error, path, temporary, total)
        self.seconds = time.perf_counter() - began

    def _on_all(self, call: Callable[[], Any]) -> list[Any]:
        """What ``call()`` returns on each process; what it raises on one, each of them raises."""
        try:
            mine = call()
        except (OSError, FloatingPointError) as error:
            mine = error
        found = [mine]
        if self.group is not None:
            found = [None] * self.world.size
            dist.all_gather_object(found, mine, group=self.group)
        for theirs in found:
            if isinstance(theirs, BaseException):
                raise theirs
        return found

    def _on_main(self, call: Callable[[], None]) -> None:
        self._on_all(lambda: call() if self.world.is_main else None)

    def _checksums(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Of this process' share of the files in ``folder``, which are on the disk then."""
        mine = sorted(folder.iterdir())[self.world.rank :: self.world.size]
        for file in mine:
            fsync(file)
        return {file.name: checkpoint_folder.checksum(file) for file in mine}

    def _put_in_place(
        self, temporary: Path, path: Path, state: dict[str, Any], checksums: dict[str, tuple[int, str]]
    ) -> None:
        checkpoint_folder.seal(temporary, state, checksums)
        temporary.rename(path)
        fsync(path.parent)
        checkpoint_folder.point_at(path)
        checkpoint_folder.prune(path.parent, *self.keep)

    def _explained(self, error: BaseException, path: Path, temporary: Path, total: int) -> BaseException:
        """``error`` as one that names ``path``, with what was written removed; what is not of the disk, as it came."""
        cause: BaseException | None = error
        if isinstance(error, CheckpointException):  # of the processes that failed
            cause = next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error)
        if not isinstance(cause, OSError):
            return error
        if path.exists():
            return NotSaved(f"{path} is saved, but what comes after was not done: {cause}")
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(cause)
        if cause.errno == errno.ENOSPC:
            free = _free(path.parent)
            reason = f"the disk is full: it takes {total} bytes and {free} are free, {max(total - free, 0)} are missing"
        return NotSaved(f"{path} was not saved ({reason}); the checkpoints before it are as they were")


def _stager(pinned: bool) -> DefaultStager:
    """One that returns when the copies are made; those from a CUDA device into ``pinned`` memory travel together."""
    return DefaultStager(StagingOptions(pinned, False, False, pinned))


def _stages_again() -> bool:
    """Whether a stager can be used more than once: before torch 2.13 it empties itself, and fails at the second use."""
    stager = _stager(pinned=False)
    stager.stage({})
    try:
        stager.stage({})
    except KeyError:
        return False
    return True


def _share(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this process has to copy and write: its parts of sharded tensors, and some of those that all have alike."""
    alike = sorted(
        (name for name, t in tensors.items() if not isinstance(t, DTensor)), key=lambda n: -tensors[n].numel()
    )
    others = set(alike) - set(alike[world.rank :: world.size])
    return {name: t for name, t in tensors.items() if name not in others}


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, part in ((name, local(tensor)) for name, tensor in tensors.items() if name.startswith(MUST_BE_FINITE)):
        if part.is_floating_point() and part.numel() and not all(map(math.isfinite, map(float, torch.aminmax(part)))):
            raise FloatingPointError(
                f"{path} is not saved: {name} is not finite; lower optim.lr or optim.linear_lr, and go on from the "
                "checkpoint before"
            )


def _make_room(temporary: Path, total: int) -> None:
    """Make the folder to write ``total`` bytes in.

    Raises:
        OSError: of what the disk lacks before a byte is written.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if total > _free(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
