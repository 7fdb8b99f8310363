"""The tools that every section of the GPU benchmark uses: its device, the reporting of results, and timing."""

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.results import Row

GIB = 2**30
NEEDS_GPU = "needs a GPU"


class Bench:
    """The tools of one section.

    Args:
        dry: whether sizes are tiny, so that numbers mean nothing.
        folder: folder of the results, for further files.
        seconds: the time that the section may take.
        report: stores a row of results.

    Attributes:
        device: a CUDA device; in a dry run without a GPU, the CPU.
    """

    def __init__(self, dry: bool, folder: Path, seconds: float, report: Callable[[Row], None]) -> None:
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.dry, self.folder, self.report = dry, folder, report
        self._end = time.monotonic() + seconds

    def about(self) -> Row:
        """Return the device, whether it computes, and torch's version.

        A stand-in for a GPU may have a real GPU's name, but it does not compute.
        """
        device = torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"
        computes = (torch.arange(1000, device=self.device) ** 2).sum().item() == 332_833_500
        return {"device": device, "computes": computes, "torch": torch.__version__}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Return the seconds that are left to the section."""
        return self._end - time.monotonic()

    def add(self, **row: Any) -> None:
        """Report a row with these keys and values."""
        self.report(row)

    @contextmanager
    def row(self, **known: Any) -> Iterator[Row]:
        """Yield a row that begins with ``known``, and report it at the end of the block.

        An error in the block is stored in the row as ``fails``.
        """
        row = dict(known)
        try:
            yield row
        except Exception as error:
            row["fails"] = in_short(error)
        self.report(row)
        self.free()

    def free(self) -> None:
        """Free unused memory, and reset the device's peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def times(self, work: Callable[[], object], repeats: int) -> list[float]:
        """Return the milliseconds of each ``work()`` on the device. The host does not wait between the calls."""
        marks = [Mark(self.on_gpu)]
        for _ in range(repeats):
            work()
            marks.append(Mark(self.on_gpu))
        self.synchronize()
        return [since.ms_to(mark) for since, mark in pairwise(marks)]

    def ms(self, work: Callable[[], object]) -> float:
        """Return the median milliseconds of ``work()`` on the device, after a warm-up."""
        self.times(work, 2 if self.dry else 5)
        return median(self.times(work, 2 if self.dry else 20))


class Mark:
    """A time stamp on the device that is taken without waiting: a CUDA event, or the time on a CPU."""

    def __init__(self, on_gpu: bool):
        self.at: Any = time.perf_counter()
        if on_gpu:
            self.at = torch.cuda.Event(enable_timing=True)
            self.at.record()

    def ms_to(self, later: "Mark") -> float:
        """Return the milliseconds from this mark to ``later``. The device must have passed both."""
        return (later.at - self.at) * 1e3 if isinstance(self.at, float) else self.at.elapsed_time(later.at)


def in_short(error: BaseException) -> str:
    """Return an error's type and the most informative line of its message: the last with "Error", or the first.

    Compilers print the line with the error near the end, before some advice.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    telling = next((line for line in reversed(lines[1:]) if "Error" in line), lines[0])
    return f"{type(error).__name__}: {telling[:250]}"


def lacks(module: str, package: str) -> str | None:
    """Return why ``module`` of the optional ``package`` cannot be imported, or None if it can."""
    try:
        import_module(module)
    except Exception as error:  # an import of an installed package may fail with any error
        return f"{package} ({in_short(error)})"
    return None


def quiet() -> None:
    """Hide Python's warnings, and log messages below the level WARNING, from the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.simplefilter("ignore")
