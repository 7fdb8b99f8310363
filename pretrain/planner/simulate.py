"""Simulate the first steps of a run on fake tensors, with the run's own code, and record the memory they hold.

No memory is allocated and nothing is computed. Scores are unknown, so a refresh selects the first rows of each layer.
Shapes and lifetimes are those of the CPU without ``torch.compile``. Of several devices, rank 0 is simulated.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.flops import flops_per_token, parameter_counts
from models.grass_linear import GrassLinear
from models.llama import Llama
from optim.grass import Grass
from optim.inner import optimizer_class
from optim.refresh_schedule import block_of
from optim.stack import OptimizerStack
from pretrain.cli.console import warnings_only
from pretrain.config.schema import Config, OptimConfig, micro_batch_size
from pretrain.distributed.engines import Engine
from pretrain.distributed.world import World
from pretrain.planner.block_layout import BlockLayout
from pretrain.planner.fake_ranks import TrafficCounter, fake_world, simulated_engine
from pretrain.planner.storage_tracker import GATHERED, TEMPORARIES, StorageTracker
from pretrain.setup.model import materialise, outline
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.step_observer import StepObserver
from pretrain.training.train_step import MicroBatch, TrainStep

COMPONENTS = ("weights", "rows", "gradients", "optimizer_state", "activations", TEMPORARIES, "sketch", GATHERED)
BETWEEN = "between"  # phases of blocks inside a group of equal blocks
MODEL = "model"

Peaks = dict[str, Counter[str]]
"""For each phase of a step, the bytes by component at its peak; under MODEL, counts of the model and of traffic."""


def simulate(config: Config, layout: BlockLayout) -> Peaks:
    """Simulate a model of ``layout.blocks`` blocks: two regular steps, and the steps up to a refresh.

    Phases are parts of a step, such as "regular backward 0 1": the kind of step ("regular" or "refresh"), the part, the
    block if it is in one, and a number, because phases repeat. The first regular step allocates the optimizer's state.
    Only warnings are logged, because a plan simulates several models.
    """
    config = replace(config, model=replace(config.model, num_hidden_layers=layout.blocks))
    with warnings_only(), fake_world(config.estimate.devices) as world:
        model = outline(config)
        engine = simulated_engine(config.train, world)
        engine.shard(model)
        peaks = _simulate(config, layout, model, world, engine)
    counts = parameter_counts(model) | {"flops_per_token": flops_per_token(model, config.train.seq_len)}
    peaks[MODEL] |= Counter(counts)
    return peaks


def _simulate(config: Config, layout: BlockLayout, model: Llama, world: World, engine: Engine) -> Peaks:
    with (
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
        _AnswerOne(),
        _compiled_torchao(config.optim),
        StorageTracker() as storages,
        TrafficCounter() as traffic,
    ):
        phases = _Phases(model, layout, storages)
        materialise(config, model, world.device)
        phases.attach()
        steps = _Steps(config, world, engine, phases, traffic)
        steps.run("regular")
        steps.run("regular")
        regular = steps.sent
        steps.refresh()
    return storages.peaks() | {MODEL: Counter(communicated=regular, refresh_communicated=steps.sent)}


class _AnswerOne(TorchDispatchMode):
    """Return 1 when code reads the value of a fake tensor, which has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 1


@contextmanager
def _compiled_torchao(optim: OptimConfig) -> Iterator[None]:
    """Allocate like torchao's optimizers, whose compiled step needs two float32 temporaries.

    Measured with torch 2.13 and torchao 0.18 on a CPU: 8.03 bytes per element (docs/memory.md); 57 without compilation.
    """

    def step(p: Tensor, *_) -> None:
        torch.empty(2, p.numel(), dtype=torch.float32, device=p.device)

    classes = {optimizer_class(name) for name in (optim.inner, optim.embedding_inner or optim.inner)}
    of_torchao = any(cls.__module__.startswith("torchao.") for cls in classes)
    with patch("torchao.optim.adam.single_param_adam", step) if of_torchao else nullcontext():
        yield


class _Phases(StepObserver):
    """Divide steps into phases by forward, backward, block, optimizer and refresh, and label tensors by component."""

    optim: OptimizerStack  # of the run, once it is built

    def __init__(self, model: Llama, layout: BlockLayout, storages: StorageTracker):
        self.model, self.layout, self.storages = model, layout, storages
        self.step_name, self.allocated_before_forward, self.in_backward = "", 0, False
        self.names = {f"layers.{i}": layout.place(i) or BETWEEN for i in range(layout.blocks)}

    def attach(self) -> None:
        """Label weights and rows now, and gradients when they appear; begin phases at the blocks of the model."""
        label = self.storages.label
        label(self.model.parameters(), "weights")
        for layer in self.model.modules():
            if isinstance(layer, GrassLinear):
                label([layer.rows, *layer.buffers()], "rows")
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: label([p.grad], "gradients"))
        for block, name in zip(self.model.layers, self.names.values(), strict=True):
            block.register_forward_pre_hook(lambda *_, name=name: self.mark(f"forward {name}"))
            block.register_forward_hook(partial(self._mark_backward_of, name))

    def _mark_backward_of(self, name: str, _block: nn.Module, _inputs: tuple, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda _: self.mark(f"backward {name}"))

    def mark(self, name: str) -> None:
        self.storages.mark(f"{self.step_name} {name}")

    def label_probes(self, grass: Grass) -> None:
        label = self.storages.label
        for layer in grass.layers.values():
            if layer.probe is not None:
                label([layer.probe], "sketch")
                layer.probe.register_post_accumulate_grad_hook(lambda p: label([p.grad], "sketch"))

    def label_state(self) -> None:
        for state in self.optim.optimizer.state.values():
            self.storages.label((t for t in state.values() if isinstance(t, Tensor)), "optimizer_state")

    # Events of a step.

    def before_forward(self) -> None:
        self.allocated_before_forward = self.storages.allocated

    def after_forward(self) -> None:
        self.storages.label_since(self.allocated_before_forward, "activations")
        self.mark("backward")

    def before_backward(self) -> None:
        self.in_backward = True

    def after_backward(self) -> None:
        self.in_backward = False
        # FSDP2 and SimulatedDDP replace gradients without a hook.
        self.storages.label((p.grad for p in self.model.parameters()), "gradients")
        self.mark("step")

    def before_optimizer(self) -> None:
        """Steps inside a backward belong to its phases; a step on one block is a separate phase."""
        if self.in_backward:
            return
        if (grass := self.optim.grass) and grass.is_partial_step:
            (block,) = {block_of(name) for name in grass.stepping}
            self.mark(f"optimizer {self.names.get(block, block)}")
        else:
            self.mark("optimizer")

    def before_refresh(self) -> None:
        self.mark("end")


class _Steps:
    """Makes the steps of a run that need different amounts of memory.

    Attributes:
        sent: bytes in collectives in the latest step.
    """

    def __init__(self, config: Config, world: World, engine: Engine, phases: _Phases, traffic: TrafficCounter):
        self.config, self.phases, self.traffic = config, phases, traffic
        self.optim = phases.optim = build_optimizer(config, phases.model)
        if self.optim.grass:
            self.optim.grass.choose = partial(_rows_in_order, self.optim.grass)
            self.optim.grass.history.note = lambda *_: None  # type: ignore[method-assign]  # fake scores have no values
        engine.wrap(phases.model)
        self.train_step = TrainStep(config, world, phases.model, engine, self.optim, observers=[phases])
        self.sent = 0

    def run(self, name: str, number: int = 0, offsets: dict[str, int] | None = None) -> None:
        """Make one update. The names of its phases begin with ``name``.

        Args:
            number: updates made before it; decides with ``offsets`` which layers are probed.
            offsets: updates by which each layer refreshes early, by layer. By default no layer is probed.
        """
        self.phases.step_name = name
        self.phases.mark("begin")
        if grass := self.optim.grass:
            for layer in grass.layers.values():
                layer.probe = None
            grass.schedule.offsets = offsets or dict.fromkeys(grass.layers, 0)
            grass.resume(number)
            self.phases.label_probes(grass)
        sent = self.traffic.bytes
        self.train_step(self._micro_batches())
        self.sent = self.traffic.bytes - sent
        self.phases.label_state()

    def refresh(self) -> None:
        """Make the steps that gather scores, of which the last refreshes; for a baseline, a step with a new projection.

        The initial choice of rows needs less memory, because there is no optimizer state yet, and is left out.
        """
        if grass := self.optim.grass:
            for probed in self.phases.layout.probed_blocks():
                others = {f"layers.{i}" for i in range(self.phases.layout.blocks) if i not in probed}
                # The other blocks begin a window in these steps.
                for left in range(min(grass.schedule.probe_steps, 2), 0, -1):
                    offsets = {name: left if block_of(name) in others else 0 for name in grass.layers}
                    self.run("refresh", grass.schedule.refresh_every - left, offsets)
        else:
            for group in self.optim.optimizer.param_groups:
                group |= {"update_proj_gap": 1} if "update_proj_gap" in group else {}
            self.run("refresh")

    def _micro_batches(self) -> list[MicroBatch]:
        """One micro-batch; two when the run accumulates gradients: more micro-batches hold no more memory."""
        train, size = self.config.train, micro_batch_size(self.config.train, self.config.estimate.devices)
        tokens = torch.zeros(size, train.seq_len, dtype=torch.int64)
        accumulated = train.tokens_per_step // (size * train.seq_len * self.config.estimate.devices)
        documents = [torch.arange(size + 1, dtype=torch.int32) * train.seq_len] if train.document_masks else []
        return [(tokens, tokens, *documents)] * min(accumulated, 2)


def _rows_in_order(grass: Grass, names: list[str], _norms: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Choose rows 0 to r-1 of each layer. The index is a real tensor, because ranks hash and compare its values."""
    layers = [grass.layers[name] for name in names]
    return [
        (torch.from_numpy(np.arange(layer.rank)), torch.ones(layer.rank) if layer.scaled else None) for layer in layers
    ]
