"""Peak memory of the first steps of a real run on the CPU, measured in a separate process in one of two ways.

events    bytes allocated by torch's CPU allocator (torch.profiler with profile_memory)
resident  resident memory as the kernel reports it (VmHWM, proc(5)), minus a baseline: the resident memory after a tiny
          run of the same code has loaded everything. malloc returns freed memory at once (``GIVE_BACK``), so that
          resident memory is memory in use.

The kind of a step is "refresh" if it ends with a refresh of the rows, else "regular".
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.steps import Run
from pretrain.config.compose import load
from pretrain.distributed.world import World

KINDS = ("regular", "regular", "refresh")
TINY = [
    "model.vocab_size=64", "model.hidden_size=32", "model.intermediate_size=48", "model.num_attention_heads=2",
    "model.num_hidden_layers=2", "train.tokens_per_step=128", "train.seq_len=64",
]  # fmt: skip
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def measure(way: str, overrides: list[str]) -> dict[str, int]:
    """Return the peak bytes by kind of step, measured in a new process.

    ``way`` is "events" or "resident", see the module. With "resident", the peaks are above a baseline, and the result
    also has the key "baseline".

    Raises:
        RuntimeError: the process fails.
    """
    command = [sys.executable, "-m", "benchmarks.real_steps", way, *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (GIVE_BACK if way == "resident" else {})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(overrides: list[str], around: Callable[[str], AbstractContextManager]) -> None:
    """Make two regular steps and a refresh step, each inside ``around(kind)``.

    Grass runs with ``optim.refresh_every=3``.
    """
    grass = [] if any(o.startswith("optim=") and o != "optim=grass" for o in overrides) else ["optim.refresh_every=3"]
    training = Run(load([*overrides, *grass]), World(0, 1, torch.device("cpu")))
    training.choose_rows(training.batch)
    for kind in KINDS:
        gc.collect()
        with around(kind):
            training.step(training.batch)


def by_events(overrides: list[str]) -> dict[str, int]:
    """Return the peak of allocated bytes by kind of step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(overrides, record_function)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    found, kind, end, held = dict.fromkeys(KINDS, 0), "", 0, 0
    for event in events:
        if event.name() in KINDS:
            kind, end = event.name(), event.end_ns()
        elif event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() <= end:
                found[kind] = max(found[kind], held)
    return found


def by_kernel(overrides: list[str]) -> dict[str, int]:
    """Return the peak of resident bytes above the baseline by kind of step, and the baseline."""
    run([*overrides, *TINY, *(["optim.rank=4"] if "optim=adamw" not in overrides else [])], record_function)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found, baseline = dict.fromkeys(KINDS, 0), resident("VmRSS")

    @contextmanager
    def around(kind: str):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the memory that is resident now
        yield
        found[kind] = max(found[kind], resident("VmHWM") - baseline)

    run(overrides, around)
    return found | {"baseline": baseline}


def resident(key: str) -> int:
    """Return the resident bytes of this process: now if ``key`` is VmRSS, the peak if it is VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    ways = {"events": by_events, "resident": by_kernel}
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.real_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("way", choices=ways)
    p.add_argument("arguments", nargs="*", help="overrides of the training command")
    args = p.parse_args()
    print(json.dumps(ways[args.way](args.arguments)))
