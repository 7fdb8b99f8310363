"""What several test files watch with."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

PAPER = {
    "selection": "top_r", "score": "exact", "probe_steps": 1, "stagger": False, "state_at_refresh": "reset",
    "new_second_moment": "mean",
}  # fmt: skip
"""Arguments of Grass: the selection, scores, refreshes and state of the paper."""

NOBODY = 65534


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """``folder`` belongs to the user of the test, who is not root: root may write everywhere."""
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes: no views, nothing changed in place."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.shapes.add(tuple(tensor.shape))
        return result


def allocations(work):
    """(peak, held): the most bytes that `work()` had allocated at once, and those still there with its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    running = list(itertools.accumulate(sizes, initial=0))
    del result
    return max(running), running[-1]
