"""Tokens per second of the methods at one size: bf16, compiled, all in one process, so that they use the same GPU.

The methods take turns of a few steps (TURN), in several rounds (ROUNDS). Each round begins with a different method.
Refreshes that come at least once per turn, or block after block, are part of the turns. Rarer refreshes, such as
GaLore's projections and the paper's refresh, are timed separately and spread over their interval.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles

import torch

from benchmarks.gpu.bench import GIB, Bench, lacks
from benchmarks.gpu.results import Row
from benchmarks.gpu.training import BYTES, TINY, TrainingRun, settings
from models.flops import flops_per_token
from pretrain.config.schema import BaselineConfig, Config, GrassConfig

TURN, ROUNDS, WARM_UP = 10, 3, 4
TO_BUILD = 45  # seconds that building and warming up a method may take
COMMON = ["train.dtype=bfloat16", "optim.lr=1e-5", "optim.linear_lr=1e-5"]  # losses on random tokens stay finite
METHODS = {
    "adamw": ["optim=adamw"],
    "muon": ["optim=muon"],
    "adamw8bit": ["optim=adamw8bit"],
    "galore": ["optim=galore", "optim.update_gap=200"],  # as in its paper
    "grass": ["optim=grass"],
    "grass+adamw": ["optim=grass", "optim.inner=adamw"],
    "grass+adamw, bf16 rows": ["optim=grass", "optim.inner=adamw", "optim.state_dtype=bfloat16"],
    "grass+adamw, the paper's refresh": ["optim=grass_paper"],
}
OPTIONAL = {"adamw8bit": ("torchao", "torchao"), "galore": ("galore_torch", "galore-torch")}
GRASSES = [method for method in METHODS if method.startswith("grass")]
BATCH = ["train.seq_len=1024", "train.tokens_per_step=16384"]


@dataclass(frozen=True)
class Case:
    """A model and batch, the rank of methods that have one, and the methods to compare.

    The first method is AdamW, the reference. ``size`` names the model of the roofline for this case.
    """

    size: str
    shape: list[str]
    rank: int
    methods: list[str]


# At 1b, the states of all methods and the activations do not fit in 80 GB together, hence two cases.
CASES = {
    "350m": Case("350m", ["model=llama_350m", *BATCH], 128, list(METHODS)),
    "1b": Case("1b", ["model=llama_1b", "model.intermediate_size=5461", *BATCH], 256, ["adamw", *GRASSES]),
    "1b_5504": Case(
        "1b", ["model=llama_1b", "model.intermediate_size=5504", *BATCH], 256, ["adamw", "grass", "grass+adamw"]
    ),
    "1b_others": Case(
        "1b", ["model=llama_1b", "model.intermediate_size=5461", *BATCH], 256, ["adamw", "muon", "adamw8bit", "galore"]
    ),
    "7b": Case(
        "7b",
        ["model=llama_7b", "model.num_hidden_layers=4", *BYTES, "train.seq_len=2048", "train.tokens_per_step=16384"],
        512, list(METHODS),
    ),
}  # fmt: skip


def configuration(case: Case, method: str, dry: bool) -> Config:
    """Return the settings of ``method`` in this case."""
    ranked = method == "galore" or method in GRASSES
    rank = [f"optim.rank={16 if dry else case.rank}"] if ranked else []
    tiny = [*TINY, "train.tokens_per_step=64"] if dry else []
    return settings([*case.shape, *COMMON, *METHODS[method], *rank, *tiny])


@dataclass
class Contender:
    """A method that is being measured.

    ``turns`` has the milliseconds of the steps of each turn, and ``host_ms`` the ``issued`` time of some further steps.
    """

    run: TrainingRun
    row: Row
    turns: list[list[float]] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def steps(self) -> list[float]:
        return [ms for turn in self.turns for ms in turn]


def run(bench: Bench, case: str) -> None:
    torch._dynamo.config.recompile_limit = 64  # versions of a block's code, which all methods share
    contenders: dict[str, Contender] = {}
    for method in CASES[case].methods:
        row = {"case": case, "method": method}
        if method in OPTIONAL and (missing := lacks(*OPTIONAL[method])):
            bench.add(**row, lacks=missing)
        elif bench.left() < TO_BUILD:
            bench.add(**row, skipped=f"{bench.left():.0f} s left")
        else:
            try:
                contenders[method] = build(bench, CASES[case], method, row)
            except Exception as error:
                with bench.row(**row):
                    raise error
    take_turns(bench, list(contenders.values()))
    dense: float | None = None
    for contender in contenders.values():
        if not contender.turns:
            bench.add(**contender.row, skipped="no time left for a turn")
            continue
        summary = summarise(contender)
        dense = dense or (summary["ms"] if contender.row["method"] == "adamw" else None)
        bench.add(**contender.row, **summary, of_adamw=dense / summary["ms"] if dense else None)


def build(bench: Bench, case: Case, method: str, row: Row) -> Contender:
    """Build and warm up the method. Its peak memory and the time of a rare refresh are added to a copy of ``row``."""
    bench.free()
    held, began = _allocated(bench), time.perf_counter()
    config = configuration(case, method, bench.dry)
    contender = Contender(TrainingRun(config, bench.device, compile=bench.on_gpu), dict(row))
    run = contender.run
    run.take_some_rows()
    run.train_step.accumulate(run.batch)  # compiles now, not in the first step below
    run.model.zero_grad(set_to_none=True)
    step = partial(run.step, run.batch)
    (first,) = bench.times(step, 1)
    bench.times(step, 1 if bench.dry else WARM_UP)
    regular = min(bench.times(step, 3))
    contender.row |= rare_refresh(bench, run, step, first, regular)
    bench.synchronize()
    contender.row |= {
        "compiled": run.compiled, "peak_gib": _peak_over(bench, held), "warm_up_s": time.perf_counter() - began,
        "flops_per_token": flops_per_token(run.model, config.train.seq_len),
    }  # fmt: skip
    return contender


def rare_refresh(bench: Bench, run: TrainingRun, step: Callable[[], object], first: float, regular: float) -> Row:
    """Return ``refresh_every`` (steps) and ``refresh_ms`` (milliseconds that a refresh adds) of a rare refresh, or {}.

    A refresh is rare if the steps of a turn need not contain one: that of GaLore's projections, and of Grass if
    its blocks do not take turns.

    Args:
        first: milliseconds of the first step, in which GaLore computes its projections.
        regular: milliseconds of a step without a refresh.
    """
    optim = run.config.optim
    if isinstance(optim, BaselineConfig):  # computes its projections in the first step
        return {"refresh_every": optim.update_gap, "refresh_ms": max(0.0, first - regular)}
    grass = run.optim.grass
    if isinstance(optim, GrassConfig) and optim.refresh_every > TURN and grass and not grass.schedule.staggered:
        probed = optim.probe_steps
        for _ in range(2):  # the first pass compiles the probed blocks
            grass.resume(optim.refresh_every - probed)
            ended = sum(bench.times(step, probed))
        return {"refresh_every": optim.refresh_every, "refresh_ms": max(0.0, ended - probed * regular)}
    return {}


def take_turns(bench: Bench, contenders: list[Contender]) -> None:
    """Time the steps of all methods in turn. Stop after a complete round if too little time is left for the next."""
    for round_ in range(1 if bench.dry else ROUNDS):
        began = time.monotonic()
        start = round_ % max(1, len(contenders))
        for contender in contenders[start:] + contenders[:start]:
            step = partial(contender.run.step, contender.run.batch)
            step()  # not counted: caches hold another method's data
            contender.turns.append(bench.times(step, 2 if bench.dry else TURN))
            contender.host_ms += [issued(bench, step) for _ in range(1 if bench.dry else 3)]
        if bench.left() < 1.2 * (time.monotonic() - began):
            return


def issued(bench: Bench, step: Callable[[], object]) -> float:
    """Return the milliseconds until the host has submitted a step to an idle device, including any waits."""
    bench.synchronize()
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def summarise(contender: Contender) -> Row:
    """Return the mean step of the median turn, with the share of a rare refresh, and the resulting tokens per second.

    Quartiles are those of all single steps.
    """
    row, train = contender.row, contender.run.config.train
    share = row["refresh_ms"] / row["refresh_every"] if "refresh_ms" in row else 0.0
    ms = median(sum(turn) / len(turn) for turn in contender.turns) + share
    low, middle, high = quantiles(contender.steps, n=4, method="inclusive")
    tokens_per_s = train.tokens_per_step / ms * 1e3
    return {
        "ms": ms, "low_ms": low, "median_ms": middle, "high_ms": high, "steps": len(contender.steps),
        "host_ms": median(contender.host_ms), "tokens_per_s": tokens_per_s,
        "tflop_per_s": tokens_per_s * row["flops_per_token"] / 1e12,
    }  # fmt: skip


def _allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated() if bench.on_gpu else 0


def _peak_over(bench: Bench, held: int) -> float | None:
    """Return the peak since the last ``free`` in GiB, without the memory of methods that were built before."""
    return (torch.cuda.max_memory_allocated() - held) / GIB if bench.on_gpu else None
