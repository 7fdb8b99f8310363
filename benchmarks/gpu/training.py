"""A model and its optimizer to be stepped without a trainer, and batches for them."""

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
    return load([*overrides, "logger.wandb.mode=disabled"])


def random_weights(config: Config, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Weights of the right shapes, drawn on ``device``: for time and memory, where minutes of the CPU would be lost."""
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in outline(config).named_parameters():
        if name.endswith("norm.weight"):
            yield name, torch.ones(weight.shape, device=device)
        elif name.endswith("weight"):  # the rows of Grass layers are made from these
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.bfloat16
            draw = torch.randn(weight.shape, device=device, dtype=dtype, generator=generator)
            yield name, draw.mul_(config.model.initializer_range)


class TrainingRun:
    """The updates of a run with ``config`` on ``device``, at the peak rates, without schedule or data of its own.

    ``compiled`` is whether its blocks are, which a machine without a working compiler prevents.

    Args:
        compile: compile the blocks, whatever ``train.compile`` says.
        drawn_on_cpu: start from the weights that a run starts from, the same on every device.
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
        """Begin with evenly spread rows, where it does not matter which."""
        if grass := self.optim.grass:
            for layer in grass.layers.values():
                layer.select(torch.arange(layer.rank, device=layer.index.device) * layer.selectable // layer.rank)
            grass.resume(0)

    def step(self, batch: Sequence[MicroBatch]) -> Tensor:
        """One update; returns the loss in nats, summed over the batch's tokens, on the device."""
        return self.train_step(batch).nats

    def rows(self) -> dict[str, Tensor]:
        """Which rows each layer of Grass trains now, on the CPU."""
        return {n: layer.index.cpu() for n, layer in self.optim.grass.layers.items()} if self.optim.grass else {}


def random_batch(config: Config, pinned: bool) -> list[MicroBatch]:
    """A step's micro-batches of random tokens, the same at every call."""
    train, generator = config.train, torch.Generator().manual_seed(0)
    sequences = train.tokens_per_step // train.seq_len
    ids = torch.randint(config.model.vocab_size, (sequences, train.seq_len + 1), generator=generator)
    return _micro_batches(config, ids, pinned)


def text_batches(config: Config, steps: int, pinned: bool) -> list[list[MicroBatch]]:
    """Micro-batches of ``steps`` steps on this project's documentation, a byte a token."""
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
    """Inputs and targets of ``ids`` (sequences, seq_len + 1), as many sequences at once as the run takes."""
    parts = ids.split(config.train.micro_batch_size or len(ids))
    pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
    return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in pairs] if pinned else list(pairs)
