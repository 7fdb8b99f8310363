"""How long a step waits for a save, in the background or not: ``python -m benchmarks.saving [overrides]``.

Builds the model and the optimizer of a run, makes one update, and saves several times to a temporary folder. Prints
JSON: the bytes of a checkpoint, and for each way of saving the median seconds that the caller waits and that the
complete save takes.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.cli.errors import clear_errors
from pretrain.config.command_line import config_from
from pretrain.config.schema import Config
from pretrain.distributed.engines import Engine
from pretrain.distributed.world import World
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.train_step import TrainStep

SAVES = 7


def measure(config: Config) -> dict[str, float]:
    """Return the bytes of a checkpoint of ``config`` and the median seconds of its saves, on the CPU."""
    world = World(0, 1, torch.device("cpu"))
    model = build_model(config, world.device)
    optim = build_optimizer(config, model)
    engine = Engine()
    engine.wrap(model)
    ids = torch.randint(config.model.vocab_size, (1, config.train.seq_len + 1))
    TrainStep(config, world, model, engine, optim)([(ids[:, :-1], ids[:, 1:])])
    tensors = checkpoint.tensors_of(model, optim)
    told: dict[str, float] = {"bytes": sum(t.numel() * t.element_size() for t in tensors.values())}
    for way in ("background", "waiting"):
        waited, took = [], []
        with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk of this folder; /tmp may be another disk
            saver = Saver(Path(folder), world, background=way == "background", keep_last=1)
            for step in range(SAVES):
                saver.save(step, tensors, {"step": step})
                saver.finish()
                waited.append(saver.blocked_seconds)
                took.append(saver.seconds)
        told |= {f"{way}: waited": round(median(waited), 4), f"{way}: whole": round(median(took), 4)}
    return told


def main() -> None:
    logging.disable(logging.INFO)
    with clear_errors():
        print(json.dumps(measure(config_from(sys.argv[1:])), indent=1))


if __name__ == "__main__":
    main()
