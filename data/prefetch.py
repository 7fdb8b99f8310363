"""Batches made ahead of the step that wants them, by a thread, and how long they were waited for."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

MicroBatches = list[tuple[Tensor, ...]]


class Prefetch:
    """`make(step)`, the micro-batches of a step, one step ahead of who asks; with `pin`, in pinned memory.

    Asking for another step than the next one only costs its making. An error is raised by the step that it is in.
    """

    def __init__(self, make: Callable[[int], Iterable[tuple[Tensor, ...]]], pin: bool = False) -> None:
        self._make, self._pin = make, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[MicroBatches]] = {}
        self._waited = 0.0
        self._steps = 0

    def __call__(self, step: int) -> MicroBatches:
        began = time.perf_counter()
        wanted = self._ahead.pop(step, None) or self._thread.submit(self._made, step)
        self._ahead = {step + 1: self._thread.submit(self._made, step + 1)}
        batches = wanted.result()
        self._waited, self._steps = self._waited + time.perf_counter() - began, self._steps + 1
        return batches

    def _made(self, step: int) -> MicroBatches:
        batches = [tuple(batch) for batch in self._make(step)]
        return [tuple(tensor.pin_memory() for tensor in batch) for batch in batches] if self._pin else batches

    def lap(self) -> float:
        """Seconds waited a step since the last lap."""
        seconds, self._waited, self._steps = self._waited / max(1, self._steps), 0.0, 0
        return seconds

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
