"""Where the host waits for the device in a step, as torch's set_sync_debug_mode reports it.

A step should wait at most once, and only if it ends with a refresh of rows. With staggered refreshes, most steps do.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.bench import NEEDS_GPU, Bench
from benchmarks.gpu.training import BYTES, TINY, TrainingRun, settings

ROOT = str(Path(__file__).resolve().parents[2])
WARM_UP, WATCHED = 12, 10
WARNING = "called a synchronizing CUDA operation"  # the mode prints another warning at its first use
SMALL = ["model=llama_nano", *BYTES, "train.tokens_per_step=4096", "train.dtype=bfloat16"]
# Frequent refreshes, so that every block refreshes in the watched steps.
FEW_LAYERS = ["model.num_hidden_layers=4", "train.tokens_per_step=4096", "optim.refresh_every=10"]
CASES = {
    "adamw": [*SMALL, "optim=adamw"],
    "muon": [*SMALL, "optim=muon"],
    "grass": [*SMALL, "optim=grass"],
    "grass+adamw": [*SMALL, "optim=grass", "optim.inner=adamw"],
    "13b_40gb, 4 layers": ["experiment=13b_40gb", *FEW_LAYERS],
    "7b_24gb, 4 layers": ["experiment=7b_24gb", *FEW_LAYERS],
}


def run(bench: Bench, case: str) -> None:
    for name, overrides in CASES.items():
        tiny = [*TINY, "train.tokens_per_step=64"] if bench.dry else []
        rank = (
            ["optim.rank=16"] if bench.dry and "optim=adamw" not in overrides and "optim=muon" not in overrides else []
        )
        with bench.row(case=name) as row:
            config = settings([*overrides, *tiny, *rank])
            run = TrainingRun(config, bench.device)
            run.take_some_rows()
            row |= _watch(bench, run)
        del run


def _watch(bench: Bench, run: TrainingRun) -> dict[str, object]:
    for _ in range(2 if bench.dry else WARM_UP):
        run.step(run.batch)
    if not bench.on_gpu:
        return {"skipped": NEEDS_GPU}
    places, each = Counter[str](), []
    for _ in range(WATCHED):
        with watched() as seen:
            run.step(run.batch)
        places += seen
        each.append(seen.total())
    return {
        "steps": WATCHED, "waits": sum(each), "most_in_a_step": max(each), "steps_without": each.count(0),
        "places": dict(places.most_common(8)),
    }  # fmt: skip


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Yield a Counter of the waits for the device in the block, by the line of this project that waits."""
    places = Counter[str]()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if WARNING in str(message):
            places[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """Return the innermost line of this project on the stack, without the benchmarks, and the line where it waits."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__ and not f.filename.endswith("warnings.py")]
    own = [f for f in frames if f.filename.startswith(ROOT) and "/site-packages/" not in f.filename]
    ours = [f for f in own if "/benchmarks/" not in f.filename]
    if not ours:
        return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "unknown"
    place, inner = ours[-1], frames[-1]
    at = f"{Path(place.filename).relative_to(ROOT)}:{place.lineno} {place.line}"
    return at if inner is place else f"{at} (in {inner.filename.rpartition('/')[2]}:{inner.lineno})"
