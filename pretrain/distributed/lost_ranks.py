"""Name the ranks that do not answer when a collective fails.

Torch's error after a timeout or a broken connection names neither the collective nor the rank. So every process in
which a collective fails records its rank in the store of the process group, and waits up to 20 seconds (at most a
quarter of the timeout) for the other ranks. Ranks that are not recorded by then are dead, stuck or very slow.
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

ROLL_CALL = timedelta(seconds=20)  # the longest wait for the other ranks to be recorded


@contextmanager
def name_lost_ranks(world: World, timeout: timedelta, leave: Callable[[], bool]) -> Iterator[None]:
    """If a collective fails inside the context, raise an error that names the missing ranks.

    Args:
        timeout: the timeout of the process groups.
        leave: returns whether this process was asked to end and must stop waiting for other ranks.

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
        who = f"no answer from rank {', '.join(map(str, missing))}" if missing else "every rank has answered"
        if leave():
            raise LostPeer(f"rank {world.rank} was asked to end while it waited in {place}") from error
        raise LostPeer(
            f"rank {world.rank} waited in vain in {place}: {who}; read the last messages of the other ranks, or raise "
            f"train.timeout_minutes={timeout.total_seconds() / 60:g} if they were only slow ({_reason(error)})"
        ) from error


def _of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _reason(error: RuntimeError) -> str:
    """The first sentence of gloo's message, without the source line."""
    return first_line(error).rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or first_line(error)


def _last_collective() -> str:
    """The newest collective in torch's flight recorder, which gloo process groups always write."""
    entries = json.loads(_dump_fr_trace_json(True, False)).get("entries")
    if not entries:
        return "no collective yet"
    last = entries[-1]
    sizes = ", ".join(f"{dtype} {size}" for dtype, size in zip(last["input_dtypes"], last["input_sizes"], strict=True))
    return f"{last['profiling_name']}({sizes})"


def _missing(world: World, place: str, patience: timedelta, leave: Callable[[], bool]) -> list[int]:
    """The ranks that are not recorded in time. If the store is lost: rank 0, unless it was recorded."""
    missing, deadline = [rank for rank in range(world.size) if rank != world.rank], time.monotonic()
    deadline += patience.total_seconds()
    try:
        assert dist.group.WORLD is not None
        store = dist.PrefixStore("roll call", dist.group.WORLD.get_group_store())
        store.set(str(world.rank), place)
        while missing and not leave() and time.monotonic() < deadline:
            time.sleep(0.1)
            missing = [rank for rank in missing if not store.check([str(rank)])]
    except dist.DistError:  # the store is in the launcher of the first node, or in rank 0
        return [0] if 0 in missing else missing
    return missing
