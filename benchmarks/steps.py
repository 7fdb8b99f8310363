"""Training steps of a method on random tokens, without the trainer, for measurements."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from benchmarks import refuse_to_run
from pretrain.config.compose import load
from pretrain.config.schema import BaselineConfig, Config, GrassConfig
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.setup.compiling import compile_blocks
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.initial_rows import choose_initial_rows
from pretrain.training.step_observer import StepObserver
from pretrain.training.train_step import MicroBatch, TrainStep

PERIOD = 4  # steps between two refreshes of GaLore or APOLLO while they are timed
COMMON = ["logger.wandb.mode=disabled", "train.compile=false"]
# Grass uses AdamW here, like the methods it is compared with. grass+muon is Grass with its default inner optimizer.
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
    "lora": ["optim=adamw"],  # add_lora changes the model
}  # fmt: skip


def add_lora(model: nn.Module, rank: int) -> None:
    """Add peft's LoRA adapters of rank ``rank`` to the attention and MLP linears, in place.

    The weights of these linears are frozen. All other parameters (embeddings, norms, head) stay trainable, as with
    Grass.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"the method lora: {error}; .venv/bin/pip install -r requirements-baselines.txt") from None
    full = [p for name, p in model.named_parameters() if "_proj" not in name]
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=r".*\.(self_attn|mlp)\..*_proj"), model)
    for p in full:
        p.requires_grad_(True)


# A rank means the same as with GaLore and LoRA, and refreshes are spread over the steps, so that all steps are alike.
EVEN = ("optim.attention_weight=1", "optim.side=auto", "optim.stagger=true")


def configuration(method: str, rank: int, overrides: Sequence[str], period: int | None = PERIOD) -> tuple[Config, int]:
    """Return the configuration of ``method`` at ``rank``, and the steps over which the time of a refresh is spread.

    GaLore and APOLLO are configured to refresh every ``period`` steps (None: at their default interval), so that a
    short measurement contains refreshes, but the time is spread over their default interval. For all other methods, the
    returned number is 1.
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
    """Seconds of one step and of its parts.

    ``optimizer_s`` includes the fold, and the refresh of a projection if it is due. ``choosing_s`` is the part of
    Grass's refresh after the fold. Probes of Grass count as forward and backward.
    """

    total_s: float
    forward_s: float
    optimizer_s: float
    refreshed: bool
    choosing_s: float = 0.0

    @property
    def backward_s(self) -> float:
        """Seconds of the backward, including gradient clipping."""
        return self.total_s - self.forward_s - self.optimizer_s - self.choosing_s


class PartTimer(StepObserver):
    """Sums the seconds of each part of a step since ``reset``.

    Args:
        now: waits for the device, and returns the time in seconds.
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


class Run:
    """A model, its optimizer and its training step without the trainer, at peak learning rates, with a random batch.

    Args:
        config: the settings; ``train.compile`` is ignored.
        world: the processes, with the device of this one.
        weights: initial weights as in ``build_model``; None to draw them as the trainer does.
        lora_rank: if not None, the attention and MLP linears are frozen and get LoRA adapters of this rank.
        compile: whether to compile the blocks.
        observers: are notified of the parts of each step.

    Attributes:
        compiled: whether the blocks are compiled, which needs a working compiler.
        batch: this process' micro-batches of a step, random tokens that are the same in every run.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        weights: Iterable[tuple[str, Tensor]] | None = None,
        lora_rank: int | None = None,
        compile: bool = False,
        observers: Sequence[StepObserver] = (),
    ):
        self.config, self.world, train = config, world, config.train
        engine = build_engine(train, world)
        self.model = build_model(config, world.device, weights, shard=engine.shard)
        if lora_rank is not None:
            add_lora(self.model, lora_rank)
        self.optim = build_optimizer(config, self.model)
        self.compiled = compile and compile_blocks(config, self.model, world)
        engine.wrap(self.model)
        self.train_step = TrainStep(config, world, self.model, engine, self.optim, observers=observers)
        sequences = train.tokens_per_step // train.seq_len // world.size
        generator = torch.Generator().manual_seed(world.rank)
        ids = torch.randint(config.model.vocab_size, (sequences, train.seq_len + 1), generator=generator)
        self.batch = micro_batches(config, ids, pinned=world.device.type == "cuda")

    def choose_rows(self, batch: Sequence[MicroBatch]) -> None:
        """Choose the initial rows by the gradient of ``batch``, as the trainer does."""
        if self.optim.grass:
            choose_initial_rows(self.optim.grass, self.train_step, batch, None)

    def take_some_rows(self) -> None:
        """Select evenly spread rows, for measurements that do not depend on the selection."""
        if grass := self.optim.grass:
            for layer in grass.layers.values():
                layer.select(torch.arange(layer.rank, device=layer.index.device) * layer.selectable // layer.rank)
            grass.resume(0)

    def step(self, batch: Sequence[MicroBatch]) -> Tensor:
        """Make one update. Return the loss in nats, summed over the batch's tokens, as a tensor on the device."""
        return self.train_step(batch).nats


def micro_batches(config: Config, ids: Tensor, pinned: bool) -> list[MicroBatch]:
    """Split ``ids`` (sequences, seq_len + 1) into micro-batches of inputs and targets, in pinned memory for a GPU."""
    parts = ids.split(config.train.micro_batch_size or len(ids))
    pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
    return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in pairs] if pinned else list(pairs)


class Steps(Run):
    """A run whose iteration makes one training step after another and yields the ``Step`` with the times of each.

    ``clock`` returns the time in seconds.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        lora_rank: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.clock, self.parts = clock, PartTimer(self.now)
        compile = config.train.compile
        super().__init__(config, world, lora_rank=lora_rank, compile=compile, observers=[self.parts])
        self.take_some_rows()

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
        """Wait for the device, and return the time in seconds."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def summarise(steps: Sequence[Step], refresh_every: int) -> dict[str, float]:
    """Return median seconds of regular steps and of a refresh, and the mean seconds ``step_s`` of a step of a long run.

    All steps are regular if ``refresh_every``, as from ``configuration``, is 1. ``refresh_s`` is the time that a
    refresh adds to a step. Grass refreshes some blocks in each step, and ``refresh_s`` is then the median per step.
    ``spread`` is the distance between the quartiles of the regular steps, relative to their median.
    """
    regular = [step for step in steps if refresh_every == 1 or not step.refreshed]
    totals = [step.total_s for step in regular]
    middle = median(totals)
    added = median(step.total_s for step in steps if step.refreshed) - middle if refresh_every > 1 else 0.0
    low, _, high = quantiles(totals if len(totals) > 1 else 2 * totals, n=4, method="inclusive")
    return {
        "forward_s": median(step.forward_s for step in regular),
        "backward_s": median(step.backward_s for step in regular),
        "optimizer_s": median(step.optimizer_s for step in regular),
        "refresh_s": added if refresh_every > 1 else median(step.choosing_s for step in regular),
        "refresh_every": refresh_every, "step_s": middle + added / refresh_every, "spread": (high - low) / middle,
    }  # fmt: skip


if __name__ == "__main__":
    refuse_to_run("steps", "step_time")
