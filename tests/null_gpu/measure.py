"""Launches, waits, host time and memory of training steps, counted on the null GPU.

    tests/null_gpu/run.sh python tests/null_gpu/measure.py model=llama_350m optim.rank=128 train.dtype=bfloat16

Arguments are settings, as of `python -m pretrain.train`. Steps are made without a trainer, on random tokens; weights
are not drawn. Host time is processor time of all threads, and this machine's: compare it only with another method's.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from counts import contexts, counts, kernels, since
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.steps import Step, Steps
from models.llama import Llama
from optim import grass, selection
from pretrain.config.compose import load
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.planner.memory import estimate

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("total", "forward", "backward", "optimizer", "choosing")
GIB = 2**30


class FreeRunning(Steps):
    """Steps with no waits but the project's own, from pinned memory as the trainer's batches are."""

    def __init__(self, config: Config, world: World):
        with patch.object(Llama, "init_weights"), patch.object(dist.ProcessGroup, "set_timeout"):
            super().__init__(config, world, clock=time.process_time)
        self.batch = [tuple(part.contiguous().pin_memory() for part in batch) for batch in self.batch]

    def now(self) -> float:
        return self.clock()


@contextmanager
def scores_that_differ() -> Iterator[None]:
    """Let Grass choose rows by numbers like real scores: with the zeros of the null GPU it would go other ways."""
    select = selection.select

    def select_by_others(name: str, scores: Tensor, *rest: Any) -> Any:
        return select(name, some_scores(len(scores)), *rest)

    # Processes would find that they do not agree, having read zeros of each other.
    with patch.object(selection, "select", select_by_others), patch.object(grass, "require_agreement"):
        yield


@cache
def some_scores(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def main() -> None:
    options = parser().parse_args()
    settings = [*options.settings, f"estimate.devices={options.processes}"]
    found: dict[str, Any] = {"settings": options.settings, "processes": options.processes}
    if options.plan:
        plan, _ = estimate(configuration(settings))
        found["planned_gib"] = max(plan.peak_bytes, plan.refresh_peak_bytes) / GIB
    world = join(options.processes)
    steps = FreeRunning(configuration(settings), world)
    beside = None
    if options.beside:
        common = [setting for setting in settings if not setting.startswith("optim")]
        beside = FreeRunning(configuration([*common, *options.beside.split()]), world)
    with scores_that_differ():
        found |= measure(steps, beside, options.warm, options.steps)
        if options.names:
            Path(options.names).write_text(kernels_of_a_step(steps))
        if options.where:
            found["waits_at"] = places_of_waits(steps, options.steps)
    report(found)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def configuration(settings: list[str]) -> Config:
    return load([*settings, "logger.wandb.mode=disabled"])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="how many to measure (%(default)s)")
    parser.add_argument("--warm", type=int, default=12, help="how many to make before, which compile (%(default)s)")
    parser.add_argument(
        "--beside",
        metavar="'KEY=VALUE ...'",
        help="step in turns with another run, which has these settings in place of optim's",
    )
    parser.add_argument("--processes", type=int, default=1, help="be the first of so many, over a group that is a fake")
    parser.add_argument("--plan", action="store_true", help="the peak by pretrain.estimate as well")
    parser.add_argument("--where", action="store_true", help="where the host waits, in as many steps more")
    parser.add_argument("--names", metavar="FILE", help="write the kernels of one step more, and their launches")
    parser.add_argument("--json", metavar="FILE", help="write what is found there too")
    return parser


def join(processes: int) -> World:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    return World(0, processes, device)


def measure(steps: Steps, beside: Steps | None, warm: int, n: int) -> dict[str, Any]:
    each, each_beside = iter(steps), iter(beside or ())
    for _ in range(warm):
        next(each), next(each_beside, None)
    torch.cuda.reset_peak_memory_stats()
    graphs = counters["stats"]["unique_graphs"]
    times, times_beside, counted, refreshed = [], [], [], []
    for _ in range(n):
        before = counts()
        times.append(next(each))
        counted.append(since(before))
        refreshed.append(has_refreshed(steps))
        times_beside += [step for step in [next(each_beside, None)] if step]
    ratios = [step.total_s / other.total_s for step, other in zip(times, times_beside, strict=False)]
    kinds = sorted({name for of_step in counted for name in of_step})
    return {
        "host_ms": host_ms(times),
        "host_ms_beside": host_ms(times_beside) if beside else None,
        "host_to_beside": median(ratios) if beside else None,
        "counted": {name: median(of_step[name] for of_step in counted) for name in kinds},
        "launches": [of_step["launches"] for of_step in counted],
        "waits": [of_step["waits"] for of_step in counted],
        "pageable_copies": [of_step["pageable_copies"] for of_step in counted],
        "refreshed": refreshed,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "graphs": counters["stats"]["unique_graphs"],
        "graphs_in_measured_steps": counters["stats"]["unique_graphs"] - graphs,
        "graph_breaks": counters["graph_break"].total(),
        "contexts": contexts(),
    }  # fmt: skip


def host_ms(times: Sequence[Step]) -> dict[str, float]:
    return {phase: median(getattr(step, f"{phase}_s") for step in times) * 1e3 for phase in PHASES}


def has_refreshed(steps: Steps) -> bool:
    """Whether Grass has chosen rows for some layer in the step just made."""
    grass = steps.optim.grass
    return grass is not None and bool(grass.schedule.due(grass.steps))


def kernels_of_a_step(steps: Steps) -> str:
    with kernels() as launched:
        next(iter(steps))
    return "".join(f"{n}\t{name}\n" for name, n in launched.most_common())


def places_of_waits(steps: Steps, n: int) -> dict[str, int]:
    """How often the host waited at each place, by torch's own account: the innermost lines of the stack."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" not in str(message):
            return
        lines = [
            f"{frame.filename.removeprefix(f'{ROOT}/').rpartition('site-packages/')[2]}:{frame.lineno} {frame.line}"
            for frame in traceback.extract_stack()
            if frame.filename not in (__file__, warnings.__file__)
        ]
        found[" < ".join(lines[:-5:-1])] += 1

    each = iter(steps)
    with warnings.catch_warnings(), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(n):
            next(each)
        torch.cuda.set_sync_debug_mode("default")
    return dict(found.most_common())


def report(found: dict[str, Any]) -> None:
    for name, phases in (("host     ", found["host_ms"]), ("beside   ", found["host_ms_beside"])):
        if phases:
            print(name, ", ".join(f"{phase} {ms:.1f}" for phase, ms in phases.items()), "ms a step, by median")
    if ratio := found["host_to_beside"]:
        print(f"          the total is {ratio:.2f} times that beside it, by median over pairs of steps")
    print("counted  ", ", ".join(f"{name} {n:g}" for name, n in found["counted"].items()), "a step, by median")
    print("launches ", *found["launches"])
    print(
        "waits    ",
        *(f"{n}{'r' * r}" for n, r in zip(found["waits"], found["refreshed"], strict=True)),
        "(r: a refresh)",
    )
    for place, n in found.get("waits_at", {}).items():
        print(f"          {n} at {place}")
    graphs = f"{found['graphs']} graphs, {found['graph_breaks']} breaks"
    print("compiled ", graphs, f"; {found['graphs_in_measured_steps']} graphs in the measured steps", sep="")
    planned = f", {found['planned_gib']:.3f} GiB planned" if "planned_gib" in found else ""
    print(f"peak      {found['allocated_gib']:.3f} GiB allocated, {found['reserved_gib']:.3f} reserved{planned}")
    if found["contexts"] != [0]:
        print("contexts ", *found["contexts"])


if __name__ == "__main__":
    sys.exit(main())
