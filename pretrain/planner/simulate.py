"""Walks through the first steps of a run on fake tensors, with the run's own code, and sees what they hold.

No memory is taken and nothing is computed, so which rows a refresh would choose is not known: the first ones stand for
them. Shapes and lifetimes are those of the CPU without ``torch.compile``. Of several devices the first is walked.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.flops import flops_per_token, parameter_counts
from models.grass_linear import GrassLinear
from models.llama import Llama
from optim.grass import Grass
from optim.inner import optimizer_class
from optim.refresh_schedule import block_of
from pretrain.config.schema import Config, OptimConfig
from pretrain.distributed.engines import Engine
from pretrain.distributed.world import World
from pretrain.planner.block_layout import Layout
from pretrain.planner.fake_ranks import Traffic, first_of, walked_engine
from pretrain.planner.storage_tracker import GATHERED, TEMPORARIES, Storages
from pretrain.setup.model import materialise, outline
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.train_step import MicroBatch, Update

COMPONENTS = ("weights", "rows", "gradients", "optimizer_state", "activations", TEMPORARIES, "sketch", GATHERED)
BETWEEN = "between"
MODEL = "model"

Seen = dict[str, Counter[str]]
"""By stretch of a step the bytes of each component at its peak; under MODEL its own numbers."""


def walk(config: Config, layout: Layout) -> Seen:
    """Walk, in a model of so many blocks, through the step that makes the optimizer's state, one more, and a refresh.

    The stretches of the first two begin with "regular", those of the refreshes with "refresh".
    """
    config = replace(config, model=replace(config.model, num_hidden_layers=layout.blocks))
    model = outline(config)
    with first_of(config.estimate.devices) as world:
        engine = walked_engine(config.train, world)
        engine.shard(model)
        seen = _walk(config, layout, model, world, engine)
    numbers = parameter_counts(model) | {"flops_per_token": flops_per_token(model, config.train.seq_len)}
    seen[MODEL] |= Counter(numbers)
    return seen


def _walk(config: Config, layout: Layout, model: Llama, world: World, engine: Engine) -> Seen:
    with (
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Ones(),
        _torchao_as_compiled(config.optim),
        Storages() as storages,
        Traffic() as traffic,
    ):
        walker = _Walker(config, layout, model, world, engine, storages, traffic)
        walker.step("regular")
        walker.step("regular")
        regular = walker.sent
        walker.refresh()
    return storages.peaks() | {MODEL: Counter(communicated=regular, refresh_communicated=walker.sent)}


def micro_batch_size(config: Config) -> int:
    """The sequences that a process takes at once."""
    train = config.train
    return train.micro_batch_size or train.tokens_per_step // (train.seq_len * config.estimate.devices)


class _Ones(TorchDispatchMode):
    """Answers 1 to whoever asks a fake tensor for its number: it has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 1


@contextmanager
def _torchao_as_compiled(optim: OptimConfig) -> Iterator[None]:
    """torchao compiles its step by itself: then it makes two float32 tensors of the parameter's size and no more.

    So do torch 2.13 and torchao 0.18 on a CPU (8.03 bytes an element, docs/memory.md); uncompiled it would be 57.
    """

    def step(p: Tensor, *_) -> None:
        torch.empty(2, p.numel(), dtype=torch.float32, device=p.device)

    classes = {optimizer_class(name) for name in (optim.inner, optim.embedding_inner or optim.inner)}
    of_torchao = any(cls.__module__.startswith("torchao.") for cls in classes)
    with patch("torchao.optim.adam.single_param_adam", step) if of_torchao else nullcontext():
        yield


class _Walker:
    """Builds a run, makes the steps that differ in what they hold, and tells ``storages`` what is what."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        model: Llama,
        world: World,
        engine: Engine,
        storages: Storages,
        traffic: Traffic,
    ):
        self.config, self.model, self.storages, self.traffic = config, model, storages, traffic
        self.layout = layout
        self.step_name, self.made_before_forward = "", 0
        self.names: dict[str, str] = {}  # of the stretches of each block
        materialise(config, model, world.device)
        self._label_model()
        self._mark_blocks()
        self.optim = build_optimizer(config, model)
        if self.optim.grass:
            self.optim.grass.choose = _first_rows(self.optim.grass)
            self.optim.grass.register_refresh_pre_hook(partial(self._mark, "end"))
        engine.wrap(model)
        engine.finish_backward = self._then_mark(engine.finish_backward, "step")  # type: ignore[method-assign]
        self.update = Update(config, world, model, engine, self.optim)
        self.optim.optimizer.register_step_pre_hook(self._before_optimizer)

    def step(self, name: str, number: int = 0, offsets: dict[str, int] | None = None) -> None:
        """One update, as update ``number`` of a window which each layer is so far into already. Sets ``sent``.

        Its stretches are called by ``name``. By default one that none probes, though a run may have none.
        """
        self.step_name = name
        self._mark("begin")
        if grass := self.optim.grass:
            for layer in grass.layers.values():
                layer.probe = None
            grass.schedule.offsets = offsets or dict.fromkeys(grass.layers, 0)
            grass.resume(number)
            self._label_probes(grass)
        sent = self.traffic.bytes
        self.update(self._micro_batches())
        self.sent = self.traffic.bytes - sent
        for state in self.optim.optimizer.state.values():
            self.storages.label((t for t in state.values() if isinstance(t, Tensor)), "optimizer_state")

    def refresh(self) -> None:
        """The steps that gather scores, the last with the refresh; for a projection, the step that renews it.

        The choice of the first rows, before there is any optimizer state, holds less.
        """
        if grass := self.optim.grass:
            for probed in self.layout.turns():
                others = {f"layers.{i}" for i in range(self.layout.blocks) if i not in probed}
                for left in range(min(grass.schedule.probe_steps, 2), 0, -1):  # the others' windows begin in it
                    offsets = {name: left if block_of(name) in others else 0 for name in grass.layers}
                    self.step("refresh", grass.schedule.refresh_every - left, offsets)
        else:
            for group in self.optim.optimizer.param_groups:
                group |= {"update_proj_gap": 1} if "update_proj_gap" in group else {}
            self.step("refresh")

    def _micro_batches(self) -> list[MicroBatch]:
        """One micro-batch, or two: more of them hold no more."""
        train, size = self.config.train, micro_batch_size(self.config)
        tokens = torch.zeros(size, train.seq_len, dtype=torch.int64)
        accumulated = train.tokens_per_step // (size * train.seq_len * self.config.estimate.devices)
        documents = [torch.arange(size + 1, dtype=torch.int32) * train.seq_len] if train.document_masks else []
        return [(tokens, tokens, *documents)] * min(accumulated, 2)

    def _label_model(self) -> None:
        """Weights and rows now, gradients as they come, as activations what a forward leaves for its backward."""
        label = self.storages.label
        label(self.model.parameters(), "weights")
        for layer in self.model.modules():
            if isinstance(layer, GrassLinear):
                label([layer.rows, *layer.buffers()], "rows")
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: label([p.grad], "gradients"))
        self.model.register_forward_pre_hook(self._before_forward)
        self.model.register_forward_hook(self._after_forward)

    def _before_forward(self, *_) -> None:
        self.made_before_forward = self.storages.made

    def _after_forward(self, *_) -> None:
        self.storages.label_since(self.made_before_forward, "activations")
        self._mark("backward")

    def _label_probes(self, grass: Grass) -> None:
        label = self.storages.label
        for layer in grass.layers.values():
            if layer.probe is not None:
                label([layer.probe], "sketch")
                layer.probe.register_post_accumulate_grad_hook(lambda p: label([p.grad], "sketch"))

    def _before_optimizer(self, *_) -> None:
        """Steps inside a backward belong to the stretches of that; a step on one block alone is called by it."""
        if self.optim.stepping_in_backward:
            return
        if (grass := self.optim.grass) and grass.is_partial_step:
            (block,) = {block_of(name) for name in grass.stepping}
            self._mark(f"optimizer {self.names.get(block, block)}")
        else:
            self._mark("optimizer")

    def _then_mark(self, function: Callable[[], None], name: str) -> Callable[[], None]:
        """``function``, with a stretch beginning where it ends."""

        def marked() -> None:
            function()
            self.storages.label((p.grad for p in self.model.parameters()), "gradients")  # those that no hook told of
            self._mark(name)

        return marked

    def _mark_then(self, name: str, function: Callable[[], None]) -> Callable[[], None]:
        """``function``, with a stretch beginning where it begins."""

        def marked() -> None:
            self._mark(name)
            function()

        return marked

    def _mark(self, name: str) -> None:
        self.storages.mark(f"{self.step_name} {name}")

    def _mark_blocks(self) -> None:
        """A stretch begins where the forward, and where the backward, of a block begins."""
        for i, block in enumerate(self.model.layers):
            name = self.layout.place(i) or BETWEEN
            self.names[f"layers.{i}"] = name
            block.register_forward_pre_hook(lambda *_, name=name: self._mark(f"forward {name}"))
            block.register_forward_hook(partial(self._await_backward, name))

    def _await_backward(self, name: str, _block: nn.Module, _inputs: tuple, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda _: self._mark(f"backward {name}"))


def _first_rows(grass: Grass):
    """In place of ``grass.choose``, which would look at scores."""

    def choose(names: list[str], norms: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        layers = [grass.layers[name] for name in names]
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(2, dtype=torch.int64))  # what processes compare their choices by
        return [(torch.arange(layer.rank), torch.ones(layer.rank) if layer.scaled else None) for layer in layers]

    return choose
