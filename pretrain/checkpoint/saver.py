"""Save checkpoints in the background: training waits only for a copy in host memory, and a thread writes the copy.

One save runs at a time. A checkpoint is written to ``step-….tmp``. It is renamed after all processes have written and
every file has its checksum; then ``latest`` is updated. If the disk fails, the error is logged and the half-written
files are removed. Older checkpoints stay, and the next scheduled save tries again.
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
from pretrain.checkpoint.directory import checksum, latest, path_of, seal
from pretrain.checkpoint.retention import tidy
from pretrain.distributed.world import World

logger = logging.getLogger(__name__)
MUST_BE_FINITE = ("model.", "optim.", "master.")
STAGES_AGAIN = torch.__version__ >= "2.13"  # compared as versions; before, the second use of a stager fails
# DCP warns about an uninitialised process group; single-process runs are expected.
warnings.filterwarnings("ignore", message="torch.distributed is")


class NotSaved(OSError):
    """A checkpoint is not on disk, because the disk or file system failed; the checkpoints before it are unchanged."""


class Saver:
    """Writes the checkpoints of a run in ``folder``. Construct it on every process.

    Args:
        folder: the folder of the checkpoints.
        background: let ``save`` return as soon as the tensors are copied to host memory; False: when all is on disk.
        keep_last: see ``retention.prune``.
        keep_every: see ``retention.prune``.
        timeout: longest time that a process waits for other processes in a save; None for torch's default.
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
        # A separate process group, because a save runs at the same time as the collectives of training.
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        # Pinned memory is slow to allocate and kept for the next save; without a GPU the copies are freed after a save.
        self._on_cuda = world.device.type == "cuda"
        self._stager = _stager(pinned=True) if self._on_cuda and STAGES_AGAIN else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the running save, to be raised in the main thread
        self._lost: NotSaved | None = None  # why the latest save is not on disk
        self.blocked_seconds = self.seconds = 0.0  # of the latest save: time that training waited, and total time

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``, unless it exists. Call on every process at the same step.

        Args:
            tensors: by name; a DTensor has the part of this process, any other tensor is the same on all processes.
            state: the content of ``state.json``, JSON-serialisable.

        Raises:
            FloatingPointError: a tensor of the previous save is not finite.
            BaseException: any other error of the previous save, except a failure of the disk, which is only logged.
        """
        self.wait()
        self._lost = None
        path = path_of(self.folder, step)
        # The main process decides for all: a network file system may show the folder to some processes later.
        if self.world.broadcast_object(path.exists()):
            return
        began = time.perf_counter()
        total = sum(t.numel() * t.element_size() for t in tensors.values())  # numel() counts all shards
        tensors = _share(tensors, self.world)
        if self.background:
            stager = self._stager or _stager(pinned=self._on_cuda)
            tensors = stager.stage(tensors)  # type: ignore[assignment]
            if stager is not self._stager:
                stager.close()  # its reference cycle would keep the copies alive after the save
            # A daemon, so that a second Ctrl-C does not wait for the disk.
            self._thread = threading.Thread(target=self._write, args=(path, tensors, state, total), daemon=True)
            self._thread.start()
        else:
            self._write(path, tensors, state, total)
        self.blocked_seconds = time.perf_counter() - began

    def poll(self) -> None:
        """Log or raise the result of a save that has ended; call after each step.

        A failure of the disk is only logged, because the next save tries again.

        Raises:
            FloatingPointError: a tensor is not finite.
            BaseException: any other error of the save, such as torch's CheckpointException.
        """
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the running save, and log or raise its result as ``poll`` does."""
        if failure := self._end():
            self._lost = failure
            logger.warning("%s; the run continues, and the next scheduled save will try again", failure)

    def finish(self) -> None:
        """Wait for the latest save, and raise its error if it failed.

        Raises:
            NotSaved: the disk failed.
            FloatingPointError: a tensor is not finite.
            BaseException: any other error in the thread of the save, such as torch's CheckpointException.
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

    # The methods below run in the thread of a save.

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
            if isinstance(error, OSError) and path.exists():  # only the flush of the folder's name failed
                logger.warning("%s is complete, but the disk could not be flushed: %s", path, error)
            else:
                self._failure = self._explained(error, path, temporary, total)
        self.seconds = time.perf_counter() - began

    def _on_all(self, call: Callable[[], Any]) -> list[Any]:
        """The results of ``call()`` on all processes, by rank; an error on one process is raised on all."""
        try:
            mine = call()
        except (OSError, FloatingPointError) as error:
            mine = error
        found = self.world.gather_objects(mine, self.group)
        for theirs in found:
            if isinstance(theirs, BaseException):
                raise theirs
        return found

    def _on_main(self, call: Callable[[], None]) -> None:
        self._on_all(lambda: call() if self.world.is_main else None)

    def _checksums(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Flush this process' share of the files in ``folder`` to disk; returns their sizes and checksums."""
        mine = sorted(folder.glob("*.safetensors"))[self.world.rank :: self.world.size]
        for file in mine:
            fsync(file)
        return {file.name: checksum(file) for file in mine}

    def _put_in_place(
        self, temporary: Path, path: Path, state: dict[str, Any], checksums: dict[str, tuple[int, str]]
    ) -> None:
        unlike = sorted({file.name for file in temporary.glob("*.safetensors")} ^ checksums.keys())
        if unlike:  # a process may see an old listing of the folder
            raise OSError(f"not all processes see the same files in {temporary}: {', '.join(unlike)}")
        seal(temporary, state, checksums)
        temporary.rename(path)
        fsync(path.parent)
        tidy(path, *self.keep)

    def _explained(self, error: BaseException, path: Path, temporary: Path, total: int) -> BaseException:
        """A disk error as NotSaved, after the half-written files are removed; any other error unchanged."""
        cause: BaseException | None = error
        if isinstance(error, CheckpointException):  # contains the errors of the processes that failed
            cause = next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error)
        if not isinstance(cause, OSError):
            return error
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(cause)
        if cause.errno == errno.ENOSPC:
            free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
            reason = f"the disk is full: {total} bytes needed, {free} free, {max(total - free, 0)} missing"
        return NotSaved(f"{path} was not saved ({reason}); the checkpoints before it are unchanged")


def _stager(pinned: bool) -> DefaultStager:
    """A stager that returns when the copies are complete; with ``pinned``, copies from a GPU are asynchronous."""
    return DefaultStager(StagingOptions(pinned, False, False, pinned))


def _share(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The tensors that this process writes: its parts of sharded tensors, and a share of the replicated tensors."""
    replicated = sorted(
        (name for name, t in tensors.items() if not isinstance(t, DTensor)), key=lambda n: -tensors[n].numel()
    )
    others = set(replicated) - set(replicated[world.rank :: world.size])
    return {name: t for name, t in tensors.items() if name not in others}


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, part in ((name, local(tensor)) for name, tensor in tensors.items() if name.startswith(MUST_BE_FINITE)):
        if part.is_floating_point() and part.numel() and not all(map(math.isfinite, map(float, torch.aminmax(part)))):
            newest = latest(path.parent)
            raise FloatingPointError(
                f"{path} is not saved, because {name} is not finite; lower optim.lr or optim.linear_lr, and run the "
                f"command again, which {f'resumes from {newest.name}' if newest else 'starts from the beginning'}"
            )


def _make_room(temporary: Path, total: int) -> None:
    """Create the empty folder ``temporary`` for ``total`` bytes.

    Raises:
        OSError: the disk has less free space.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if total > shutil.disk_usage(temporary).free:
        raise OSError(errno.ENOSPC, "No space left on device")
