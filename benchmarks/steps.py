"""Training steps without a trainer, to be timed: a method at a size on random tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import nn

from benchmarks import refuse_to_run
from pretrain.config.compose import load
from pretrain.config.schema import BaselineConfig, Config, GrassConfig
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.setup.compiling import compile_blocks
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.step_observer import StepObserver
from pretrain.training.train_step import TrainStep

PERIOD = 4  # while GaLore or APOLLO is timed, one step in so many is a refresh
COMMON = ["logger.wandb.mode=disabled", "train.compile=false"]
# With one inner optimizer, so that the methods differ in nothing else; grass+muon is Grass with its default one.
METHODS = {
    "adamw": ["optim=adamw"],
    "muon": ["optim=muon"],
    "adamw8bit": ["optim=adamw8bit"],
    "galore": ["optim=galore"],
    "apollo": ["optim=apollo"],
    "grass": ["optim=grass", "optim.inner=adamw"],
    "grass+head": [
        "optim=grass", "optim.inner=adamw", "optim.patterns=['*.self_attn.*_proj','*.mlp.*_proj','lm_head']",
    ],
    "grass+muon": ["optim=grass", "optim.inner=muon"],
    "lora": ["optim=adamw"],  # with what add_lora makes of the model
}  # fmt: skip


def add_lora(model: nn.Module, rank: int) -> None:
    """Low-rank adapters (the peft package's) on every linear but the head; all that Grass trains in full still is."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"the method lora: {error}; .venv/bin/pip install -r requirements-baselines.txt") from None
    full = [p for name, p in model.named_parameters() if "_proj" not in name]
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=r".*\.(self_attn|mlp)\..*_proj"), model)
    for p in full:
        p.requires_grad_(True)


EVEN = ("optim.attention_weight=1", "optim.side=auto")  # a rank is the same share of a layer as that of GaLore and LoRA


def configuration(method: str, rank: int, overrides: Sequence[str], period: int | None = PERIOD) -> tuple[Config, int]:
    """The settings of ``method``, and its refresh interval by default; while it is timed that is ``period``, if given.

    The interval is 1 where all steps are of one kind: those of a method that never refreshes, and of Grass as it is by
    default, in which some blocks refresh in each step.
    """
    base = [*METHODS[method], *COMMON, *overrides]
    optim = load(base).optim
    if isinstance(optim, GrassConfig):
        return load([*METHODS[method], *EVEN, f"optim.rank={rank}", *COMMON, *overrides]), 1
    if isinstance(optim, BaselineConfig):
        return load([*base, f"optim.rank={rank}", f"optim.update_gap={period or optim.update_gap}"]), optim.update_gap
    return load(base), 1


@dataclass
class Step:
    """Seconds of one step and of its parts; the optimizer's hold the fold and a refresh of a projection, if due.

    choosing_s is what Grass's refresh takes after the fold; what its probes take is part of forward and backward.
    """

    total_s: float
    forward_s: float
    optimizer_s: float
    refreshed: bool
    choosing_s: float = 0.0

    @property
    def backward_s(self) -> float:
        """With the clipping of its gradients."""
        return self.total_s - self.forward_s - self.optimizer_s - self.choosing_s


class PartTimer(StepObserver):
    """Seconds that the parts of a step take, summed since ``reset``.

    Args:
        now: the time in seconds, read after the device has finished.
    """

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.reset()

    def reset(self) -> None:
        self.forward_s = self.optimizer_s = self.choosing_s = 0.0

    def before_forward(self) -> None:
        self.forward_s -= self.now()

    def after_forward(self) -> None:
        self.forward_s += self.now()

    def before_optimizer(self) -> None:
        self.optimizer_s -= self.now()

    def after_optimizer(self) -> None:
        self.optimizer_s += self.now()

    def before_refresh(self) -> None:
        self.choosing_s -= self.now()

    def after_refresh(self) -> None:
        self.choosing_s += self.now()


class Steps:
    """A model and all it takes to train it; iterating makes steps.

    With ``lora_rank`` the model's linears are frozen and get adapters of that rank.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        lora_rank: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.config, self.world, self.clock = config, world, clock
        train, engine = config.train, build_engine(config.train, world)
        self.model = build_model(config, world.device, shard=engine.shard)
        if lora_rank is not None:
            add_lora(self.model, lora_rank)
        self.optim = build_optimizer(config, self.model)
        if train.compile:
            compile_blocks(config, self.model, world)
        engine.wrap(self.model)
        self.parts = PartTimer(self.now)
        self.train_step = TrainStep(config, world, self.model, engine, self.optim, observers=[self.parts])
        sequences = train.tokens_per_step // train.seq_len // world.size
        generator = torch.Generator().manual_seed(world.rank)
        ids = torch.randint(config.model.vocab_size, (sequences, train.seq_len + 1), generator=generator)
        pieces = ids.split(train.micro_batch_size or sequences)
        self.batch = [(piece[:, :-1], piece[:, 1:]) for piece in pieces]
        if self.optim.grass:  # any rows will do, without the backwards that a run chooses its first ones by
            for layer in self.optim.grass.layers.values():
                layer.select(torch.arange(layer.rank, device=layer.index.device) * layer.selectable // layer.rank)
            self.optim.grass.resume(0)

    def __iter__(self) -> Iterator[Step]:
        optim, step = self.config.optim, 0
        period = optim.update_gap if isinstance(optim, BaselineConfig) else PERIOD
        while True:
            self.parts.reset()
            began = self.now()
            self.train_step(self.batch)
            total = self.now() - began
            optimizer = self.parts.optimizer_s - self.parts.choosing_s  # the refresh runs in a hook of the optimizer
            yield Step(total, self.parts.forward_s, optimizer, step % period == 0, self.parts.choosing_s)
            step += 1

    def now(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


@dataclass
class Timing:
    """Median seconds of regular steps and their parts, and of steps with a refresh."""

    regular_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    with_refresh_s: float
    refresh_every: int  # steps, by the method's default
    choosing_s: float = 0.0  # of Grass
    quartiles: tuple[float, float] = (0.0, 0.0)  # of regular steps

    @property
    def refresh_s(self) -> float:
        """What one refresh adds; of Grass, some blocks of which refresh in each step, what choosing takes in a step."""
        return self.with_refresh_s - self.regular_s if self.refresh_every > 1 else self.choosing_s

    @property
    def step_s(self) -> float:
        """The mean step of a long run."""
        return self.regular_s + (self.with_refresh_s - self.regular_s) / self.refresh_every


def summarise(steps: Sequence[Step], refresh_every: int) -> Timing:
    """Medians; where ``refresh_every`` is 1 there is one kind of step."""
    regular = [step for step in steps if refresh_every == 1 or not step.refreshed]
    refreshing = [step for step in steps if refresh_every == 1 or step.refreshed]
    return Timing(
        median(step.total_s for step in regular), median(step.forward_s for step in regular),
        median(step.backward_s for step in regular), median(step.optimizer_s for step in regular),
        median(step.total_s for step in refreshing), refresh_every, median(step.choosing_s for step in regular),
        _quartiles([step.total_s for step in regular]),
    )  # fmt: skip


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


if __name__ == "__main__":
    refuse_to_run("steps", "step_time")
