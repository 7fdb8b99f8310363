"""Time of a step with a refresh, relative to a regular step: medians of steps that alternate.

python -m benchmarks.refresh_time                       # llama_60m, rank 128, sketch; all layers refresh at once
python -m benchmarks.refresh_time optim.score=exact     # any overrides of the training command
python -m benchmarks.refresh_time --as-set --pairs 20   # refreshes as configured, relative to a run without refreshes
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.steps import Run
from pretrain.config.compose import load
from pretrain.distributed.world import World

SHAPE = [
    "model=llama_60m", "optim.rank=128", "optim.selection=top_r", "optim.refresh_every=10", "train.seq_len=256",
    "train.tokens_per_step=1024",
]  # fmt: skip
# The most expensive case: every second step scores and refreshes all layers. The steps between do neither.
TOGETHER = ["optim.refresh_every=2", "optim.probe_steps=1", "optim.stagger=false"]


def measure(overrides: list[str], pairs: int) -> dict[str, float]:
    """Return the median seconds of regular and of refresh steps, which alternate, and the median of their ratios.

    A ratio is that of a refresh step to the regular step before it. ``pairs`` is the number of such pairs.
    """
    timed = timed_step([*overrides, *TOGETHER])
    regular, refresh = zip(*[(timed(), timed()) for _ in range(pairs + 2)][2:], strict=True)  # 2 warm-up pairs
    ratios = [slow / plain for plain, slow in zip(regular, refresh, strict=True)]
    return {"regular_s": median(regular), "refresh_s": median(refresh), "ratio": median(ratios)}


def measure_as_set(overrides: list[str], pairs: int) -> dict[str, float]:
    """Return the median step seconds of two runs, with frozen rows and as configured, and the ratio of their sums.

    The runs take turns of one step, ``pairs`` times. With staggered refreshes, every step may score some blocks, so
    there are no regular steps. The cost of refreshes is then the ratio over complete refresh intervals.
    """
    frozen, as_set = (timed_step([*overrides, *more]) for more in (["optim.selection=frozen"], []))
    plain, whole = zip(*[(frozen(), as_set()) for _ in range(pairs + 2)][2:], strict=True)
    return {"frozen_s": median(plain), "as_set_s": median(whole), "ratio": sum(whole) / sum(plain)}


def timed_step(overrides: list[str]) -> Callable[[], float]:
    """Build a run of llama_60m at rank 128, and return a function that makes its next step and returns the seconds.

    ``overrides`` change the run. On a CPU, the seconds are CPU time of all threads of the process, because other
    programs affect it less than wall time.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(load([*SHAPE, *overrides]), World(rank=0, size=1, device=device))
    run.choose_rows(run.batch)

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def timed() -> float:
        began = seconds()
        run.step(run.batch)
        return seconds() - began

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the training command, such as optim.sketch_width=32")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of a regular and a refresh step (default 15)")
    parser.add_argument("--as-set", action="store_true", help="refresh as configured, and compare with frozen rows")
    arguments = parser.parse_args()
    print(json.dumps((measure_as_set if arguments.as_set else measure)(arguments.overrides, arguments.pairs)))


if __name__ == "__main__":
    main()
