"""The tensors of a checkpoint: names, and reading them with torch.distributed.checkpoint from safetensors files.

The model's tensors are named ``model.<parameter or buffer>``. The optimizer's tensors have the names given by
``OptimizerStack.tensors``.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem

from models.int8_weight import full_weight
from models.weights import listed
from optim.refresh_schedule import block_of
from optim.stack import OptimizerStack
from pretrain.checkpoint.directory import Damaged, read_manifest, verify
from pretrain.cli.errors import first_line

INT8_PARTS = ("weight_step", "rows", "index")  # tensors needed to dequantise an 8-bit weight


def tensors_of(model: nn.Module, optim: OptimizerStack) -> dict[str, Tensor]:
    """Every tensor of ``model`` and ``optim`` that the next step depends on, by name: views, not copies."""
    # Unlike state_dict(), these list a tied weight once: safetensors refuses tensors that share memory.
    named = [*model.named_parameters(), *model.named_buffers()]
    return {f"model.{name}": tensor.detach() for name, tensor in named} | optim.tensors()


def load(path: Path, model: nn.Module, optim: OptimizerStack) -> None:
    """Fill ``model`` and ``optim`` in place with the tensors of the checkpoint at ``path``.

    Raises:
        ValueError: a damaged checkpoint, or its tensors do not match this model and optimizer.
    """
    reader, stored = _open(path)
    optim.make_room(stored)
    tensors = tensors_of(model, optim)
    if unlike := sorted(tensors.keys() ^ stored.keys()):
        raise ValueError(
            f"{path} and this model and optimizer differ in {listed(unlike)}; use the settings of the saved run "
            "(model.*, optim.*)"
        )
    for name, tensor in tensors.items():
        if (dtype := stored[name].properties.dtype) != tensor.dtype:
            fix = f"set optim.state_dtype={str(dtype).removeprefix('torch.')}" if name.endswith(".rows") else ""
            raise ValueError(
                f"{path} has {name} in {dtype}, but this run needs {tensor.dtype}; {fix or 'check train.dtype'}"
            )
    _fill(path, reader, tensors, no_dist=not torch.distributed.is_initialized())


def read_weights(path: Path, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Read weights of the model from the checkpoint at ``path``, one block of the model at a time.

    Weights stored in 8 bits are dequantised to ``dtype``; other weights keep their stored dtype.

    Args:
        names: the weights to read, by their names in the model.

    Yields:
        (name, weight) for each of ``names``: complete tensors on the CPU.

    Raises:
        ValueError: the checkpoint is damaged, or lacks one of the weights.
    """
    verify(path)
    reader, stored = _open(path)
    if absent := [name for name in names if f"model.{name}" not in stored]:
        raise ValueError(f"{path} lacks {listed(absent)}; use a checkpoint of this model")
    for _, block in groupby(names, block_of):
        yield from _read_block(path, reader, stored, list(block), dtype).items()


class _Files(FileSystem):
    """A folder that shows only the files ``names``, because DCP reads every safetensors file in a folder."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


def _open(path: Path) -> tuple[dcp.HuggingFaceStorageReader, Mapping[str, Any]]:
    """A reader of the checkpoint at ``path``, and its tensors' metadata by name."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    reader.fs = _Files(list(read_manifest(path)))
    try:
        return reader, reader.read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise Damaged(path, first_line(error)) from None


def _fill(path: Path, reader: dcp.HuggingFaceStorageReader, tensors: dict[str, Tensor], no_dist: bool) -> None:
    """Copy the stored tensors of the same names into ``tensors``, one at a time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # single-process runs are expected
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
        except (SafetensorError, dcp.api.CheckpointException) as error:
            raise Damaged(path, first_line(error)) from None


def _read_block(
    path: Path, reader: dcp.HuggingFaceStorageReader, stored: Mapping[str, Any], names: list[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    layers = [name.removesuffix(".weight") for name in names if f"model.{name}_step" in stored]  # the 8-bit layers
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
