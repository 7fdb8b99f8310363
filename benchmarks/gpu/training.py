"""Models with their optimizers and batches, for training steps without the trainer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.steps import Run, micro_batches
from pretrain.config.compose import load
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.setup.model import outline
from pretrain.training.train_step import MicroBatch

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


class TrainingRun(Run):
    """The training steps of a run with ``config`` on ``device``, on one process.

    Args:
        compile: whether to compile the blocks; ``train.compile`` is ignored.
        drawn_on_cpu: whether to draw the initial weights as a run does, so that they are the same on every device.
    """

    def __init__(self, config: Config, device: torch.device, *, compile: bool = False, drawn_on_cpu: bool = False):
        weights = None if drawn_on_cpu else random_weights(config, device)
        super().__init__(config, World(0, 1, device), weights, compile=compile)

    def rows(self) -> dict[str, Tensor]:
        """Return the selected rows of each Grass layer, on the CPU."""
        return {n: layer.index.cpu() for n, layer in self.optim.grass.layers.items()} if self.optim.grass else {}


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
        batches.append(micro_batches(config, ids, pinned))
    return batches
