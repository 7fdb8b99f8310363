"""Complete runs of a tiny model on one process, in the test's own process or by their command."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from pretrain.cli.signals import StopRequest
from pretrain.config.compose import load
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.setup.data import ready
from pretrain.training.trainer import Trainer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = [
    "data=text", "model.vocab_size=400", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2", "optim.warmup_steps=2", "train.steps=8",
    "train.tokens_per_step=256", "train.micro_batch_size=2",
    "train.seq_len=32", "train.eval_sequences=4", "train.log_every=1", "train.checkpoint_every=0", "train.eval_every=0",
    "train.compile=false", "train.sample_tokens=4", "logger.wandb.mode=disabled",
]  # fmt: skip
GRASS = ["optim.rank=8", "optim.attention_weight=1", "optim.selection=top_r", "optim.refresh_every=7"]


def train(overrides, stop=None):
    """Run in this process; returns the run's folder and the trainer."""
    config = load(overrides)
    folder = RunFolder(config)
    with folder.locked():
        trainer = Trainer(config, ALONE, ready(config, 1), folder, StopRequest() if stop is None else stop)
        trainer.fit()
    return folder, trainer


def losses(folder):
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def selections(folder):
    """What a run shows of its selections: in its metric lines, and by layer."""
    means = [
        {name: value for name, value in json.loads(line).items() if name.startswith("grass/")}
        for line in folder.metrics_file.read_text().splitlines()
    ]
    lines = folder.selection_file.read_text().splitlines() if folder.selection_file.exists() else []
    return [line for line in means if line], [json.loads(line) for line in lines]


def run_cli(root: Path, *arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "pretrain.train", *arguments],
        cwd=root, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
