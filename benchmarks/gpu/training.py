"""Models with their optimizers and batches, for training steps without the trainer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.config.compose import load
from pretrain.config.schema import Config
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.setup.compiling import compile_blocks
from pretrain.setup.model import build_model, outline
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.initial_rows import choose_initial_rows
from pretrain.training.train_step import MicroBatch, TrainStep

DOCS = Path(__file__).resolve().parents[2] / "docs"
BYTES = ["model.vocab_size=256", "data.vocab_size=256"]  # text as bytes: no tokenizer is needed
TINY = [
    *BYTES, "model.hidden_size=64", "model.intermediate_size=96", "model.num_attention_heads=2",
    "model.num_hidden_layers=2", "train.seq_len=32",
]  # fmt: skip


def settings(overrides: Sequence[str]) -> Config:
    """Return the settings of these overrides, without W&B."""
    return load([*overrides, "logger.wandb.mode=disabled"])


def random_weights(config: Config, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights, drawn on ``device``, for measurements of time and memory. The CPU would take minutes."""
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in outline(config).named_parameters():
        if name.endswith("norm.weight"):
            yield name, torch.ones(weight.shape, device=device)
        elif name.endswith("weight"):  # other parameters, the rows of Grass layers, are made from weights
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
            draw = torch.randn(weight.shape, device=device, dtype=dtype, generator=generator)
            yield name, draw.mul_(config.model.initializer_range)


class TrainingRun:
    """The training steps of a run with ``config`` on ``device``, at peak learning rates and on given batches.

    ``compiled`` says whether the blocks are compiled, which needs a working compiler.

    Args:
        compile: whether to compile the blocks; ``train.compile`` is ignored.
        drawn_on_cpu: whether to draw the initial weights as a run does, so that they are the same on every device.
    """

    def __init__(self, config: Config, device: torch.device, *, compile: bool = False, drawn_on_cpu: bool = False):
        self.config, self.world = config, World(0, 1, device)
        self.model = build_model(config, device, None if drawn_on_cpu else random_weights(config, device))
        self.optim = build_optimizer(config, self.model)
        self.compiled = compile and compile_blocks(config, self.model, self.world)
        engine = build_engine(config.train, self.world)
        engine.wrap(self.model)
        self.train_step = TrainStep(config, self.world, self.model, engine, self.optim)

    def choose_rows(self, batch: Sequence[MicroBatch]) -> None:
        """Choose the initial rows by the gradient of ``batch``, as a run does."""
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

    def rows(self) -> dict[str, Tensor]:
        """Return the selected rows of each Grass layer, on the CPU."""
        return {n: layer.index.cpu() for n, layer in self.optim.grass.layers.items()} if self.optim.grass else {}


def random_batch(config: Config, pinned: bool) -> list[MicroBatch]:
    """Return a step's micro-batches of random tokens, the same in every call."""
    train, generator = config.train, torch.Generator().manual_seed(0)
    sequences = train.tokens_per_step // train.seq_len
    ids = torch.randint(config.model.vocab_size, (sequences, train.seq_len + 1), generator=generator)
    return _micro_batches(config, ids, pinned)


def text_batches(config: Config, steps: int, pinned: bool) -> list[list[MicroBatch]]:
    """Return the micro-batches of ``steps`` steps on the text of this project's documentation, one token per byte."""
    train = config.train
    text = bytearray(b"\n".join(path.read_bytes() for path in sorted(DOCS.glob("*.md"))))
    tokens = torch.frombuffer(text, dtype=torch.uint8).long()
    sequences = train.tokens_per_step // train.seq_len
    batches = []
    for step in range(steps):
        starts = [(step * sequences + i) * train.seq_len % (len(tokens) - train.seq_len - 1) for i in range(sequences)]
        ids = torch.stack([tokens[start : start + train.seq_len + 1] for start in starts])
        batches.append(_micro_batches(config, ids, pinned))
    return batches


def _micro_batches(config: Config, ids: Tensor, pinned: bool) -> list[MicroBatch]:
    """Split ``ids`` (sequences, seq_len + 1) into the run's micro-batches of inputs and targets."""
    parts = ids.split(config.train.micro_batch_size or len(ids))
    pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
    return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in pairs] if pinned else list(pairs)
