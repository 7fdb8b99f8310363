"""Make the batches of the next step during the current step, and measure how long training waits for batches."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

MicroBatches = list[tuple[Tensor, ...]]


class Prefetch:
    """Makes the micro-batches of a step in a thread, one step ahead. Call it with a step to get its micro-batches.

    Steps may be requested in any order, but only the step after the last requested one is made in advance. An error
    while a step is made is raised by the call that requests the step.

    Args:
        make: Returns the micro-batches of a step.
        pin: Copy the micro-batches into pinned memory, for asynchronous copies to a GPU.
        ready: Returns whether a step can be made in advance now. If not, it is made when it is requested.
    """

    def __init__(
        self,
        make: Callable[[int], Iterable[tuple[Tensor, ...]]],
        pin: bool = False,
        ready: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self._make, self._pin, self._ready = make, pin, ready
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[MicroBatches]] = {}
        self._waited = 0.0
        self._steps = 0

    def __call__(self, step: int) -> MicroBatches:
        began = time.perf_counter()
        wanted = self._ahead.pop(step, None) or self._thread.submit(self._made, step)
        self._ahead = {step + 1: self._thread.submit(self._made, step + 1)} if self._ready(step + 1) else {}
        batches = wanted.result()
        self._waited, self._steps = self._waited + time.perf_counter() - began, self._steps + 1
        return batches

    def _made(self, step: int) -> MicroBatches:
        batches = [tuple(batch) for batch in self._make(step)]
        return [tuple(tensor.pin_memory() for tensor in batch) for batch in batches] if self._pin else batches

    def add(self, seconds: float) -> None:
        """Add `seconds` that training waited outside of this class to the waiting time that `lap` returns."""
        self._waited += seconds

    def lap(self) -> float:
        """Seconds per step that training waited since the last call of `lap`."""
        seconds, self._waited, self._steps = self._waited / max(1, self._steps), 0.0, 0
        return seconds

    def close(self) -> None:
        """Drop the batches made in advance, without waiting for a step that is being made."""
        self._thread.shutdown(wait=False, cancel_futures=True)
