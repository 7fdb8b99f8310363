"""What a checkpoint holds: every tensor of a run by name, by torch.distributed.checkpoint in safetensors files.

    model.…, optim.<parameter>.<state>, master.<parameter>, grass.<layer>, history.<layer>.<rows or latest>

How it is written is in pretrain.saver, what lies beside the tensors in pretrain.checkpoint_folder.
"""

import warnings
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn

from models.int8_weight import full_weight
from optim.refresh_schedule import block_of
from optim.stack import OptimizerStack
from pretrain.checkpoint.directory import Damaged, latest, path_of, read_state, verify
from pretrain.cli.errors import first_line

__all__ = ["Damaged", "latest", "load", "path_of", "read_state", "read_weights", "tensors_of"]
INT8_PARTS = ("weight_step", "rows", "index")  # what makes a weight in 8 bits whole


def load(path: Path, model: nn.Module, optim: OptimizerStack) -> None:
    """Fill ``model`` and all of ``optim`` in place with the tensors of the checkpoint at ``path``.

    Raises:
        ValueError: a damaged checkpoint, or one whose tensors are not those of this model and optimizer.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise Damaged(path, first_line(error)) from None
    optim.make_room(stored)
    tensors = tensors_of(model, optim)
    if unlike := sorted(tensors.keys() ^ stored.keys()):
        raise ValueError(f"{path} is not of this model and optimizer: {', '.join(unlike[:4])} …")
    for name, tensor in tensors.items():
        entry: Any = stored[name]
        if (dtype := entry.properties.dtype) != tensor.dtype:
            mend = f"set optim.state_dtype={str(dtype).removeprefix('torch.')}" if name.endswith(".rows") else ""
            raise ValueError(
                f"{path} holds {name} in {dtype}, this run wants {tensor.dtype}; {mend or 'check train.dtype'}"
            )
    _fill(path, reader, tensors, no_dist=not torch.distributed.is_initialized())


def _fill(path: Path, reader: dcp.HuggingFaceStorageReader, tensors: dict[str, Tensor], no_dist: bool) -> None:
    """Copy into ``tensors`` what the checkpoint has by their names, one at a time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
        except (SafetensorError, dcp.api.CheckpointException) as error:
            raise Damaged(path, first_line(error)) from None


def read_weights(path: Path, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The model's weights of these names, and nothing else of the checkpoint at ``path``: read a block at a time.

    Those that a run kept in 8 bits come whole, in ``dtype``; the others as they are.

    Raises:
        ValueError: a damaged checkpoint, or one that lacks a name.
    """
    verify(path)
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise Damaged(path, first_line(error)) from None
    if absent := [name for name in names if f"model.{name}" not in stored]:
        raise ValueError(f"{path} lacks {', '.join(absent[:4])} …")
    for _, block in groupby(names, block_of):
        yield from _read_together(path, reader, stored, list(block), dtype).items()


def _read_together(
    path: Path, reader: dcp.HuggingFaceStorageReader, stored: Mapping[str, Any], names: list[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    layers = [name.removesuffix(".weight") for name in names if f"model.{name}_step" in stored]  # in 8 bits
    parts = [f"{layer}.{part}" for layer in layers for part in INT8_PARTS]
    tensors = {}
    for name in [*names, *parts]:
        entry = stored[f"model.{name}"]
        tensors[f"model.{name}"] = torch.empty(entry.size, dtype=entry.properties.dtype)
    _fill(path, reader, tensors, no_dist=True)
    for layer in layers:
        step, rows, index = (tensors.pop(f"model.{layer}.{part}") for part in INT8_PARTS)
        codes = tensors[f"model.{layer}.weight"]
        dim = 0 if rows.shape == (len(index), codes.shape[1]) else 1
        tensors[f"model.{layer}.weight"] = full_weight(codes, step, rows, index, dim, dtype)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def tensors_of(model: nn.Module, optim: OptimizerStack) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, by name. Views, not copies."""
    # Unlike state_dict(), these name a tied weight once: safetensors refuses tensors that share memory.
    named = [*model.named_parameters(), *model.named_buffers()]
    return {f"model.{name}": tensor.detach() for name, tensor in named} | optim.tensors()
