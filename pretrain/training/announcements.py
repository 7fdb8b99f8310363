"""Messages of a run: its size, data and device at the beginning, and the next commands at the end."""

import logging
from pathlib import Path

import torch

from data.token_dataset import PreparedDataset
from data.wording import python_command
from models.flops import parameter_counts
from models.llama import Llama
from optim.memory import held_bytes
from optim.stack import OptimizerStack
from pretrain.config.schema import Config, GrassConfig, micro_batch_size
from pretrain.distributed.world import World
from pretrain.training.rates import peak_rates

logger = logging.getLogger(__name__)


def log_opening(config: Config, world: World, model: Llama, stack: OptimizerStack, data: PreparedDataset) -> None:
    """Log the model, the number of tokens, the batches, the device, and the memory needed without activations."""
    train, optim, counts = config.train, config.optim, parameter_counts(model)
    total, share = train.steps * train.tokens_per_step, counts["trainable"] / counts["parameters"]
    rank = f", rank {optim.rank}" if isinstance(optim, GrassConfig) else ""
    corpus = "being prepared" if config.data.on_the_fly else f"{len(data.train):,} tokens"
    sequences = micro_batch_size(train, world.size)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    parameters = f"{counts['parameters']:,} parameters, {counts['trainable']:,} trained ({share:.0%})"
    lines = {
        "model": f"{config.model.name}: {parameters}",
        "optimizer": f"{optim.name} ({optim.inner}{rank})",
        "peak rates": peak_rates(config),
        "tokens": f"{total:,} in {train.steps:,} steps; the corpus: {corpus}",
        "batch": f"{train.tokens_per_step:,} tokens; micro-batches of {sequences} × {train.seq_len:,} tokens",
        "device": f"{world.size} × {device}, {train.dtype}",
        "memory": _memory(held_bytes(model, stack)),
    }
    for name, text in lines.items():
        logger.info("%-10s  %s", name, text)


def _memory(held: dict[str, int | None]) -> str:
    known = {name: size for name, size in held.items() if size is not None}
    unit, name_of_unit = (2**30, "GiB") if sum(known.values()) >= 2**30 else (2**20, "MiB")
    parts = ", ".join(f"{name} {size / unit:.1f}" for name, size in known.items())
    others = "".join(f" + {name}" for name in (*(held.keys() - known.keys()), "activations"))
    return f"{sum(known.values()) / unit:.1f} {name_of_unit} per device by formula ({parts}){others}"


def log_next_commands(config: Config, folder: Path) -> None:
    """Log the usual commands after a finished run, to be copied into a shell."""
    prompt = next((prompt for prompt in config.data.prompts if prompt.strip().isprintable()), "The ").strip()
    commands = [
        ["report", str(folder)],
        ["generate", str(folder), "--prompt", prompt],
        ["export", str(folder), "--out", f"{folder}-exported"],
    ]
    logger.info("next: the report of the run, text from its model, and its model for transformers:")
    for name, *arguments in commands:
        logger.info("  %s", python_command(f"pretrain.{name}", *arguments))
