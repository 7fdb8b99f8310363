"""``train.profile=N``: a trace of N steps, and on a GPU a snapshot of its memory, in ``profile/`` of the run.

The trace opens in https://ui.perfetto.dev, the memory snapshot in https://docs.pytorch.org/memory_viz.
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pretrain.config.schema import SETTLING

logger = logging.getLogger(__name__)
EVENTS = 100_000  # maximum number of allocator events to keep


class StepProfile:
    """A context that records ``steps`` training steps after the first three. Call ``step`` after each step.

    folder/trace.json.gz  operations and kernels over time, on the CPU and the GPU
    folder/memory.pickle  on a GPU: every allocation and the line of code that made it

    Args:
        steps: 0 records nothing.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.folder, self.on_gpu = folder, device.type == "cuda"
        self.profiler: profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            wanted = schedule(skip_first=SETTLING - 1, wait=0, warmup=1, active=steps, repeat=1)
            self.profiler = profile(
                activities=activities, schedule=wanted, on_trace_ready=self._write, record_shapes=True
            )

    def __enter__(self) -> "StepProfile":
        if self.profiler:
            if self.on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=EVENTS)
            self.profiler.start()
        return self

    def step(self) -> None:
        if self.profiler:
            self.profiler.step()

    def __exit__(self, *_) -> None:
        if self.profiler:
            self.profiler.stop()  # writes the steps recorded so far

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json.gz"))
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("wrote a profile to %s", self.folder)
