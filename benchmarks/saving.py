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

from benchmarks.steps import Run
from pretrain.checkpoint import tensors as checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.cli.errors import clear_errors
from pretrain.config.command_line import config_from
from pretrain.config.schema import Config
from pretrain.distributed.world import World

SAVES = 7


def measure(config: Config) -> dict[str, float]:
    """Return the bytes of a checkpoint of ``config``, and by way of saving the median seconds, on the CPU."""
    run = Run(config, World(0, 1, torch.device("cpu")))
    run.step([tuple(part[:1] for part in run.batch[0])])  # one sequence
    tensors = checkpoint.tensors_of(run.model, run.optim)
    told: dict[str, float] = {"bytes": sum(t.numel() * t.element_size() for t in tensors.values())}
    for way in ("background", "waiting"):
        waited, took = [], []
        with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk of this folder; /tmp may be another disk
            saver = Saver(Path(folder), run.world, background=way == "background", keep_last=1)
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
