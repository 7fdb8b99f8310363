"""A process that waits in vain for another ends with an error that names the other and the collective.

What torch raises after the timeout of a process group, or when a connection breaks, tells neither. So each process that
it happens to signs its name in the store through which all of them met, and looks for a while who else does: those who
do not are the ones that are dead or stuck.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

from pretrain.cli.errors import LostPeer, first_line
from pretrain.distributed.world import World

ROLL_CALL = timedelta(seconds=20)  # how long the others have to sign, at the most


@contextmanager
def named(world: World, timeout: timedelta, leave: Callable[[], bool]) -> Iterator[None]:
    """Turn the failure of a collective into one that names who was missing.

    Args:
        timeout: of the process groups.
        leave: whether this process has been told to end, and should not wait for signatures any more.

    Raises:
        LostPeer: a collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _of_a_collective(error):
            raise
        place = _last_collective()
        missing = _missing(world, place, min(timeout / 4, ROLL_CALL), leave)
        who = f"no answer from rank {', '.join(map(str, missing))}" if missing else "every rank answers"
        if leave():
            raise LostPeer(f"rank {world.rank} was told to end while it waited in {place}") from error
        raise LostPeer(
            f"rank {world.rank} waited in vain in {place}: {who}; see what was said there last, or raise "
            f"train.timeout_minutes={timeout.total_seconds() / 60:g} if it was only slow ({_reason(error)})"
        ) from error


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _reason(error: RuntimeError) -> str:
    """The first sentence of gloo's message, without the place in its source."""
    return first_line(error).rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or first_line(error)


def _last_collective() -> str:
    """The newest entry of torch's flight recorder, which every process group over gloo writes."""
    entries = json.loads(_dump_fr_trace_json(True, False)).get("entries")
    if not entries:
        return "no collective yet"
    last = entries[-1]
    sizes = ", ".join(f"{dtype} {size}" for dtype, size in zip(last["input_dtypes"], last["input_sizes"], strict=True))
    return f"{last['profiling_name']}({sizes})"


def _missing(world: World, place: str, patience: timedelta, leave: Callable[[], bool]) -> list[int]:
    """The ranks that do not sign in time; none when the store itself is gone."""
    missing, deadline = [rank for rank in range(world.size) if rank != world.rank], time.monotonic()
    deadline += patience.total_seconds()
    try:
        assert dist.group.WORLD is not None
        store = dist.PrefixStore("roll call", dist.group.WORLD.get_group_store())
        store.set(str(world.rank), place)
        while missing and not leave() and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = [rank for rank in missing if not store.check([str(rank)])]
    except dist.DistError:  # it lives in the launcher of the first node, or in rank 0
        return [0] if 0 in missing else missing
    return missing
