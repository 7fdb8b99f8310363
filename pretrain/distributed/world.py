"""This process among the processes of a run: its rank and device, its process group, and simple collectives."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.cli.errors import LostPeer, first_line
from pretrain.cli.ranks import world_size_from_env

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the ``size`` processes of a run. With a single process, nothing is communicated."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def use_device(self) -> None:
        """Make ``device`` the current device of the calling thread.

        Every thread starts with the first GPU, where calls without a device would create a CUDA context of half a GB.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def sum(self, values: Tensor) -> Tensor:
        """``values``, replaced in place by their element-wise sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process. Uses only the CPU, and does not wait for the device."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value)
        return bool(value)

    def broadcast_object(self, value: Any) -> Any:
        """The ``value`` of the main process, on every process; the value is pickled."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, call: Callable[[], T]) -> T:
        """Run ``call`` on the main process only, and return its result on every process.

        A ValueError or OSError of ``call`` is raised on every process.
        """
        found: Any = None
        if self.is_main:
            try:
                found = call()
            except (ValueError, OSError) as error:
                found = error
        found = self.broadcast_object(found)
        if isinstance(found, ValueError | OSError):
            raise found
        return found

    def gather_objects(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The ``value`` of every process, in the order of ranks; values are pickled.

        Args:
            group: a second process group of all processes, for calls from another thread than the training's; None
                for the default group.
        """
        box = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(box, value, group=group)
        return box

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def shards_of(parallel: str, shards: int | None, world_size: int) -> int:
    """The number of processes that share one copy of the model: 1 for "ddp", all for "fsdp", ``shards`` for "hsdp".

    Args:
        parallel: ``train.parallel``.
        shards: ``train.shards``; None for the number of processes on this node.
    """
    if parallel != "hsdp":
        return world_size if parallel == "fsdp" else 1
    return shards or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def connect(timeout: timedelta) -> World:
    """Join the process group of torchrun's processes: gloo for tensors on the CPU, NCCL for tensors on GPUs.

    A single process has no process group.

    Args:
        timeout: the timeout of joining, and of every collective.

    Raises:
        ValueError: this machine has more processes than GPUs.
        LostPeer: not all processes joined in time.
    """
    size, rank = world_size_from_env(), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(f"there are more processes than GPUs ({torch.cuda.device_count()}); lower NPROC")
    world = World(rank, size, device)
    world.use_device()
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
        except dist.DistError as error:
            raise LostPeer(
                f"not all of the {size} processes of this run connected ({first_line(error)}); read the messages of "
                "the others, or raise train.timeout_minutes"
            ) from error
    return world


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
