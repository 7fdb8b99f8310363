"""Time by kernel, number of launches and idle time of the device in a step, from torch's profiler."""

import time
from collections import Counter

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import NEEDS_GPU, Bench
from benchmarks.gpu.step_times import CASES, configuration
from benchmarks.gpu.training import TrainingRun

STEPS, SHOWN = 5, 25
METHODS = ("adamw", "grass", "grass+adamw")


def run(bench: Bench, case: str) -> None:
    for method in METHODS:
        with bench.row(method=method) as row:
            row |= measure(bench, method)
        torch.compiler.reset()


def measure(bench: Bench, method: str) -> dict[str, object]:
    """Return the averages per step at 350m. The profiler's trace is saved as ``trace-<method>.json.gz``."""
    config = configuration(CASES["350m"], method, bench.dry)
    run = TrainingRun(config, bench.device, compile=bench.on_gpu)
    run.take_some_rows()
    for _ in range(2 if bench.dry else 12):
        run.step(run.batch)
    bench.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    with profile(activities=activities) as seen:
        began = time.perf_counter()
        for _ in range(STEPS):
            run.step(run.batch)
        bench.synchronize()
        step_ms = (time.perf_counter() - began) / STEPS * 1e3
    trace = bench.folder / f"trace-{method}.json.gz"
    seen.export_chrome_trace(str(trace))
    found: dict[str, object] = {"compiled": run.compiled, "step_ms": step_ms, "trace": trace.name}
    if not bench.on_gpu:
        return found | {"skipped": NEEDS_GPU}
    # Host operations are left out: they are listed with the time of their kernels, which would count twice.
    times, launches = Counter[str](), 0
    for event in seen.key_averages():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times[event.key[:90]] += event.self_device_time_total / 1e3 / STEPS
            launches += event.count
    if not times:
        return found | {"lacks": "CUPTI: the profiler recorded no kernels"}
    device_ms = sum(times.values())
    return found | {
        "device_ms": device_ms, "idle": max(0.0, 1 - device_ms / step_ms), "launches": launches / STEPS,
        "kernels_ms": {name: round(ms, 3) for name, ms in times.most_common(SHOWN)},
    }  # fmt: skip
