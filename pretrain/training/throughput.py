"""Time, tokens and peak memory of training steps."""

import platform
import resource
import time

import torch


class Stopwatch:
    """Seconds and tokens of training since the last ``lap``, with pauses for evaluation and checkpoints left out."""

    def __init__(self, clock=time.perf_counter):
        self._clock = clock
        self.total_seconds = self._seconds = 0.0
        self._tokens = self._steps = 0
        self._since: float | None = None

    def start(self) -> None:
        self._since = self._clock()

    def stop(self, tokens: int) -> None:
        """End the step that ``start`` began; it trained on ``tokens``."""
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
    """The most memory held so far: by CUDA's allocator, or, on a CPU, resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024
