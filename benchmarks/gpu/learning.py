"""Train a small model on text for some steps, on any device: for the sections correctness and determinism."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.training import BYTES, TINY, TrainingRun, settings, text_batches

# Constant learning rates, so that each of the few steps matters.
RATES = ["optim.lr=4e-3", "optim.linear_lr=5e-4"]
METHODS = {
    "grass+muon": ["optim=grass"],
    "grass+adamw": ["optim=grass", "optim.inner=adamw"],
    "adamw": ["optim=adamw"],
}
STEPS = 20


@dataclass
class Learned:
    """Losses of the steps in nats per token. After the last step: the rows of each Grass layer, and all parameters."""

    losses: list[float]
    rows: dict[str, Tensor]
    parameters: list[Tensor]
    compiled: bool


def learn(overrides: Sequence[str], device: torch.device, dry: bool, compile: bool = False) -> Learned:
    """Train some steps on text, 20 or in a dry run 3, and return the result."""
    shape = [*TINY, "train.tokens_per_step=128", "optim.rank=16"] if dry else [*BYTES, "train.tokens_per_step=4096"]
    if "optim=adamw" in overrides:
        shape = [override for override in shape if not override.startswith("optim.rank")]
    config = settings(["model=llama_nano", *shape, *RATES, *overrides])
    batches = text_batches(config, 3 if dry else STEPS, pinned=device.type == "cuda")
    run = TrainingRun(config, device, compile=compile, drawn_on_cpu=True)
    run.choose_rows(batches[0])
    nats = torch.stack([run.step(batch) for batch in batches])
    losses = (nats / config.train.tokens_per_step).tolist()
    return Learned(losses, run.rows(), [p.detach().cpu() for p in run.model.parameters()], run.compiled)
