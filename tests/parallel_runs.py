"""Tiny runs on several processes of one machine, and what to compare them by."""

import json
import logging
import math

import torch
from torch._C._distributed_c10d import _dump_fr_trace_json
from torch.distributed.tensor import DTensor

from pretrain.checkpoint.tensors import load as load_tensors
from pretrain.checkpoint.tensors import tensors_of
from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.distributed.engines import build_engine
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.setup.model import build_model
from pretrain.setup.optimizer import build_optimizer
from pretrain.training.trainer import Trainer
from tests.processes import in_processes

CPU = torch.device("cpu")
STEPS, REFRESH = 30, 8  # chooses rows four times
TINY = [
    "data=text", "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "optim.warmup_steps=2", f"train.steps={STEPS}",
    "train.tokens_per_step=256", "train.seq_len=32", "train.eval_sequences=7", "train.log_every=1",
    "train.checkpoint_every=0", "train.eval_every=0", "train.compile=false", "train.sample_tokens=4",
    "logger.wandb.mode=disabled", "train.dtype=float64", "optim.rank=8", f"optim.refresh_every={REFRESH}",
    "optim.selection=top_r", "data.validation_share=0.2", "optim.weight_decay=0.1",
]  # fmt: skip
GRASS = {
    "top_r": [],
    "multinomial_norm": ["optim.selection=multinomial_norm"],
    "columns": ["optim.side=columns", "optim.state_at_refresh=reset"],
}

FSDP, HSDP = ["train.parallel=fsdp"], ["train.parallel=hsdp", "train.shards=2"]


class Recording(Trainer):
    """Notes the rows that every step trained."""

    def fit(self):
        self.chosen = []
        return super().fit()

    def train_step(self, step):
        if self.optim.grass:
            self.chosen.append({name: layer.index.tolist() for name, layer in self.optim.grass.layers.items()})
        return super().train_step(step)


def train(overrides, rank=0, size=1):
    """Run in this process as ``rank`` of ``size``; leaves what was ``chosen`` and held beside what the run leaves."""
    config = load(overrides)
    folder = RunFolder(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    trainer = Recording(config, World(rank, size, CPU), ready(config, size), folder, StopRequest())
    trainer.fit()
    (folder.path / f"chosen-{rank}.json").write_text(json.dumps(trainer.chosen))
    torch.save(whole_tensors(trainer.model, trainer.optim), folder.path / f"held-{rank}.pt")
    return folder


def collectives(overrides, rank, size):
    """What the first update of a run says to the other processes: (name, dtype, numbers), and the sizes it trains.

    As torch's flight recorder has it, which every process group writes.
    """
    config = load(overrides)
    folder = RunFolder(config)
    trainer = Trainer(config, World(rank, size, CPU), ready(config, size), folder, StopRequest())
    before = max((entry["record_id"] for entry in _recorded()), default=-1)  # it keeps the latest 2000 or so
    trainer.train_step(0)
    sizes = {name: (p.numel(), p.requires_grad) for name, p in trainer.model.named_parameters()}
    return [
        (entry["profiling_name"], entry["input_dtypes"][0], math.prod(entry["input_sizes"][0]))
        for entry in sorted(_recorded(), key=lambda entry: entry["record_id"])
        if entry["record_id"] > before
    ], sizes


def _recorded():
    return json.loads(_dump_fr_trace_json(True, False)).get("entries", [])


def whole_tensors(model, optim):
    """All that a checkpoint holds, put together from every process."""
    tensors = tensors_of(model, optim)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def open_checkpoint(path, overrides, rank=0, size=1):
    """What a run with these settings finds in the checkpoint at ``path``."""
    config, world = load(overrides), World(rank, size, CPU)
    model = build_model(config, CPU, shard=build_engine(config.train, world).shard)
    optim = build_optimizer(config, model)
    load_tensors(path, model, optim)
    return whole_tensors(model, optim)


def run(overrides, rank, size):
    train(overrides, rank, size)


def _all(rank, size, calls):
    logging.disable(logging.INFO)
    return [function(*given, rank, size) for function, *given in calls]


def spawn(size, folder, calls):
    """Every process makes the same calls, (function, *arguments) each, with its rank and size as the last arguments.

    Returns for every call what it returned to each process.
    """
    return list(zip(*in_processes(size, folder, _all, size, calls), strict=True))


def values(folder, name):
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def chosen(folder, size):
    found = [json.loads((folder.path / f"chosen-{rank}.json").read_text()) for rank in range(size)]
    assert all(other == found[0] for other in found)
    return found[0]


def assert_same_run(ours, size, theirs, tolerance=1e-9):
    """The same rows at every step and the same losses and gradient norms, validation included."""
    assert chosen(ours, size) == chosen(theirs, 1)
    assert_same_losses(ours, theirs, tolerance)
    assert values(ours, "val/loss").keys() == {STEPS}


def assert_same_losses(ours, theirs, tolerance=1e-9):
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        mine, other = values(ours, name), values(theirs, name)
        assert mine.keys() >= other.keys() and len(other) > 0
        assert max(abs(mine[step] - other[step]) for step in other) <= tolerance, name
