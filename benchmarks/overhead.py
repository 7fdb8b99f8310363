"""Speed of the trainer relative to a bare loop. The trainer adds data, metrics, offline W&B and checkpoints.

python -m benchmarks.overhead                                     # the default run's model and optimizer, 200 steps
python -m benchmarks.overhead model=llama_60m data.vocab_size=32000 train.steps=100   # any overrides

The bare loop and the trainer take turns of one step in one process, so that noise on the machine affects both. The
trainer's time is the time of ``fit``, until the last checkpoint is written, minus the time of the bare loop.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from data.token_dataset import PreparedDataset
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.train_step import StepResult
from pretrain.training.trainer import Outcome, Trainer

AS_TIMED = [
    "train.steps=200", "train.checkpoint_every=100", "train.eval_every=0", "train.compile=false",
    "train.sample_tokens=0", "logger.wandb.mode=offline",
]  # fmt: skip


def bare_loop(config: Config, device: torch.device) -> Iterator[None]:
    """Train the model of ``config`` with its optimizer in a minimal loop: no data loading, no log, no checkpoints.

    The tokens are random, and already on the device. The first ``next`` builds everything. Each further ``next`` makes
    one of ``train.steps`` steps.
    """
    train = config.train
    model = build_model(config, device)
    optim = build_optimizer(config, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    sequences = train.tokens_per_step // train.seq_len
    ids = torch.randint(config.model.vocab_size, (8, sequences, train.seq_len + 1), device=device)

    def loss_of(step: int) -> torch.Tensor:
        batch = ids[step % len(ids)]
        return model(batch[:, :-1], batch[:, 1:]) / train.tokens_per_step

    yield
    if optim.grass:
        optim.grass.start(lambda: loss_of(0).backward())
    for step in range(train.steps):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, config.optim.clip)
        optim.optimizer.step()
        optim.optimizer.zero_grad()
        if (step + 1) % train.log_every == 0:
            loss.item()
        yield


class Timed(Trainer):
    """A trainer that makes a step of the bare loop before each step of its own, and times both."""

    def __init__(self, config: Config, world: World, data: PreparedDataset, folder: RunFolder, stop: StopRequest):
        super().__init__(config, world, data, folder, stop)
        self.bare, self.bare_s, self.all_s = bare_loop(config, world.device), 0.0, 0.0
        next(self.bare)  # builds the bare loop's model, untimed like the trainer's

    def fit(self) -> Outcome:
        began = time.perf_counter()
        self._bare_step()  # includes grass.start, as fit does for the trainer
        finished = super().fit()
        self.all_s = self.last - began
        return finished

    def _bare_step(self) -> None:
        began = time.perf_counter()
        next(self.bare, None)
        self.bare_s += time.perf_counter() - began

    def train_step(self, step: int) -> StepResult:
        self._bare_step()
        return super().train_step(step)

    def finish(self) -> Outcome:
        self.checkpoints.wait()
        self.last = time.perf_counter()
        self.log.close({})
        return Outcome.FINISHED


def measure(overrides: list[str]) -> dict[str, Any]:
    """Return the tokens per second of the bare loop and of the trainer, and the ratio trainer to bare loop."""
    with tempfile.TemporaryDirectory() as root:
        config = load([*AS_TIMED, *overrides, f"run.root={root}"])
        folder = RunFolder(config)
        world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        with folder.locked():
            trainer = Timed(config, world, ready(config, 1), folder, StopRequest())
            trainer.fit()
    tokens, trainer_s = config.train.steps * config.train.tokens_per_step, trainer.all_s - trainer.bare_s
    return {
        "bare_tokens_per_s": tokens / trainer.bare_s, "trainer_tokens_per_s": tokens / trainer_s,
        "ratio": trainer.bare_s / trainer_s, "steps": config.train.steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the training command")
    print(json.dumps(measure(parser.parse_args().overrides)))


if __name__ == "__main__":
    main()
