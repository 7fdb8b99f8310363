"""Checks that all processes of a run have the same settings, code, torch, data and initial weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.token_dataset import PreparedDataset
from models.dtensor import local, place
from pretrain.config.compose import flat
from pretrain.config.schema import Config, marked
from pretrain.distributed.world import World
from pretrain.runs.code_version import ROOT

CODE = ("models", "optim", "data", "pretrain")


class Disagreement(ValueError):
    """Processes of a run differ. The message has a line for each difference, with the values and ranks."""


def require_same_setting(config: Config, data: PreparedDataset, world: World) -> None:
    """Compare the settings, code, torch and data of all processes. Call on every process before anything is built.

    Raises:
        Disagreement: on every process, if any of them differ.
    """
    if world.size == 1:
        return
    # Each machine may have a separate copy of the corpus; equal copies have the same fingerprint.
    per_rank = marked(config, "per_rank")
    mine = {key: value for key, value in flat(OmegaConf.structured(config)).items() if key not in per_rank}
    mine |= {"code": code_hash(), "torch": torch.__version__}
    mine |= {"tokenizer": data.tokenizer.sha256, "data": data.fingerprint}
    if found := _differences(world.gather_objects(mine)):
        fix = "start every process with the same command, code, environment and corpus"
        raise Disagreement("\n".join(["the processes of this run differ", *found, fix]))


def require_same_weights(tensors: Mapping[str, Tensor], world: World) -> None:
    """Compare the ``tensors`` of all processes by name; sharded tensors only among processes with the same shard.

    Raises:
        Disagreement: on every process, if any of them differ.
    """
    if world.size == 1:
        return
    mine = {f"{name}{_place(tensor)}": _digest(local(tensor)) for name, tensor in tensors.items()}
    if found := _differences(world.gather_objects(mine)):
        first = f"the processes of this run have different initial values of {len(found)} tensors"
        fix = "they come from train.seed, train.init_from or a checkpoint: every process must read the same files"
        raise Disagreement("\n".join([first, *found[:4], fix]))


def _differences(by_rank: list[dict[str, Any]]) -> list[str]:
    """A line for each key with several values; a process without the key is ignored."""
    lines = []
    for key in dict.fromkeys(key for mine in by_rank for key in mine):
        holders: dict[str, list[int]] = {}
        for rank, mine in enumerate(by_rank):
            if key in mine:
                holders.setdefault(str(mine[key]), []).append(rank)
        if len(holders) > 1:
            lines.append(f"{key}: " + "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items()))
    return lines


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _place(tensor: Tensor) -> str:
    """The part of a sharded tensor on this process, as text; "" for a complete tensor."""
    here = place(tensor)
    complete = all(part == slice(0, size) for part, size in zip(here, tensor.shape, strict=True))
    return "" if complete else str([(part.start, part.stop) for part in here])


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=8).hexdigest()


def code_hash() -> str:
    """A hash of the source files of the packages used in training, including files that git does not track."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(file for folder in CODE for file in Path(ROOT, folder).rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
