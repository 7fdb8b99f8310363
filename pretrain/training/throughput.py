"""Time, tokens and peak memory of training steps."""

import platform
import resource
import time
from collections.abc import Callable

import torch


class Stopwatch:
    """Seconds and tokens of training steps, without the validations and saves between them.

    ``total_seconds`` is the time of all training steps of the run.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._began: float | None = None
        self.total_seconds = self._earlier_seconds = self._seconds = 0.0
        self._tokens = self._steps = 0
        self._since: float | None = None

    @property
    def wall_seconds(self) -> float:
        """Wall time of the run so far, from ``begin`` on."""
        return self._earlier_seconds + (0.0 if self._began is None else self._clock() - self._began)

    def resume(self, wall_seconds: float, total_seconds: float) -> None:
        """Continue with the times of a checkpoint."""
        self._earlier_seconds, self.total_seconds = wall_seconds, total_seconds

    def begin(self) -> None:
        """Begin to count wall time."""
        self._began = self._clock()

    def start(self) -> None:
        """Begin a step."""
        self._since = self._clock()

    def stop(self, tokens: int) -> None:
        """End the step that ``start`` began and that trained on ``tokens`` tokens."""
        assert self._since is not None
        seconds = self._clock() - self._since
        self._seconds, self.total_seconds = self._seconds + seconds, self.total_seconds + seconds
        self._tokens, self._steps = self._tokens + tokens, self._steps + 1

    def lap(self) -> tuple[float, float]:
        """(tokens per second, seconds per step) since the last lap."""
        rates = self._tokens / self._seconds, self._seconds / self._steps
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return rates


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far in bytes: of CUDA's allocator, or on a CPU the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
