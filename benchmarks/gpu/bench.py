"""What every section gets: the device, a way to report, and clocks."""

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.results import Row

GIB = 2**30
NEEDS_GPU = "needs a GPU"


@dataclass
class Bench:
    """One section's view of the machine.

    device  a CUDA device; in a dry run without one, the CPU
    dry     tiny sizes, whose numbers mean nothing
    folder  for files beside the results
    end     when the section is to be over, by time.monotonic()
    report  takes a row of results
    """

    device: torch.device
    dry: bool
    folder: Path
    end: float
    report: Callable[[Row], None]

    @classmethod
    def make(cls, dry: bool, folder: Path, seconds: float, report: Callable[[Row], None]) -> "Bench":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        return cls(device, dry, folder, time.monotonic() + seconds, report)

    def about(self) -> Row:
        """What the numbers are of. A stand-in for a GPU may have a real one's name, but it does not compute."""
        device = torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"
        computes = (torch.arange(1000, device=self.device) ** 2).sum().item() == 332_833_500
        return {"device": device, "computes": computes, "torch": torch.__version__}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the section is to be over."""
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        self.report(row)

    @contextmanager
    def row(self, **known: Any) -> Iterator[Row]:
        """A row to fill, which begins with ``known``; an error in the body becomes its ``fails``."""
        row = dict(known)
        try:
            yield row
        except Exception as error:
            row["fails"] = in_short(error)
        self.report(row)
        self.free()

    def free(self) -> None:
        """Let go of the memory that nothing holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def times(self, work: Callable[[], object], repeats: int) -> list[float]:
        """Milliseconds on the device of each ``work()``, called without a wait between them."""
        marks = [Mark(self.on_gpu)]
        for _ in range(repeats):
            work()
            marks.append(Mark(self.on_gpu))
        self.synchronize()
        return [since.ms_to(mark) for since, mark in pairwise(marks)]

    def ms(self, work: Callable[[], object]) -> float:
        """The median of them, after a warm-up."""
        self.times(work, 2 if self.dry else 5)
        return median(self.times(work, 2 if self.dry else 20))


class Mark:
    """A moment in the device's work, noted without waiting for it: an event of CUDA, or the time on a CPU."""

    def __init__(self, on_gpu: bool):
        self.at: Any = time.perf_counter()
        if on_gpu:
            self.at = torch.cuda.Event(enable_timing=True)
            self.at.record()

    def ms_to(self, later: "Mark") -> float:
        """Milliseconds from here to ``later``, which the device must have passed."""
        return (later.at - self.at) * 1e3 if isinstance(self.at, float) else self.at.elapsed_time(later.at)


def in_short(error: BaseException) -> str:
    """An error's type and the line of its message that says most: compilers put theirs last, before some advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    telling = next((line for line in reversed(lines[1:]) if "Error" in line), lines[0])
    return f"{type(error).__name__}: {telling[:250]}"


def lacks(module: str, package: str) -> str | None:
    """Why ``module`` of the optional ``package`` cannot be used here; None where it can."""
    try:
        import_module(module)
    except Exception as error:  # a package that is there may fail in what it imports, in any way
        return f"{package} ({in_short(error)})"
    return None


def quiet() -> None:
    """Leave the section's rows and real warnings on the terminal, and nothing else."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.simplefilter("ignore")
