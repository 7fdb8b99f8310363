"""Whether an experiment of conf/ trains in the memory of its card, with the peak that the planner predicts.

The planner simulates the same steps in the same run. torch's allocator is limited to the memory of the experiment's
card, so a run that needs more fails here as it would on that card.
"""

import time

import torch

from benchmarks.gpu.bench import GIB, NEEDS_GPU, Bench
from benchmarks.gpu.results import Row
from benchmarks.gpu.training import TINY, TrainingRun, settings
from pretrain.config.schema import Config
from pretrain.planner.memory import estimate

STEPS = 6


def run(bench: Bench, case: str) -> None:
    experiment, _, how = case.partition(" ")
    compile = how == "compiled"
    # Two micro-batches per step have the same peak as many.
    overrides = [f"experiment={experiment}", "train.tokens_per_step=4096"]
    if bench.dry:
        overrides = [f"experiment={experiment}", *TINY, "train.tokens_per_step=64", "optim.rank=16"]
    config = settings(overrides)
    card = config.estimate.device_memory_gib or 0.0  # each of these experiments sets the memory of its card
    with bench.row(case=case, card_gib=card) as row:
        if compile and not bench.on_gpu:
            row["skipped"] = NEEDS_GPU
            return
        # Without a memory limit, the planner does not search for the largest micro-batch.
        found, _ = estimate(settings([*overrides, "estimate.device_memory_gib=null"]))
        row["planned_gib"] = max(found.peak_bytes, found.refresh_peak_bytes) / GIB
        _limit(bench, card - config.estimate.context_gib)
        _train(bench, config, compile, row)


def _limit(bench: Bench, gib: float) -> None:
    """Limit torch's allocator to ``gib`` GiB, or to the device's memory if that is less."""
    if bench.on_gpu:
        total = torch.cuda.get_device_properties(bench.device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))


def _train(bench: Bench, config: Config, compile: bool, row: Row) -> None:
    """Choose the initial rows and make some steps as a run does. Add their times and peaks to ``row``."""
    run = TrainingRun(config, bench.device, compile=compile)
    row["compiled"] = run.compiled
    bench.synchronize()
    began = time.perf_counter()
    run.choose_rows(run.batch)
    bench.synchronize()
    row["initial_rows_s"] = time.perf_counter() - began
    row |= {f"{key}_choosing": gib for key, gib in _peaks(bench).items()}
    times = []
    for _ in range(2 if bench.dry else STEPS):
        began = time.perf_counter()
        run.step(run.batch)
        bench.synchronize()
        times.append(time.perf_counter() - began)
    row |= {"first_step_s": times[0], "step_s": min(times), **_peaks(bench)}


def _peaks(bench: Bench) -> dict[str, float]:
    """Return the peaks since the last call, and the memory that all processes use on the device now, with contexts."""
    if not bench.on_gpu:
        return {}
    free, total = torch.cuda.mem_get_info()
    peaks = {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "taken_gib": (total - free) / GIB,
    }  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    return peaks
