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
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.int8_weight import whole
from optim.refresh_schedule import block_of
from optim.stack import Optimization
from pretrain.checkpoint.directory import Damaged, latest, path_of, read_state, verify
from pretrain.cli.errors import first_line

__all__ = ["Damaged", "latest", "load", "path_of", "read_state", "read_weights", "tensors_of"]
INT8_PARTS = ("weight_step", "rows", "index")  # what makes a weight in 8 bits whole


def load(path: Path, model: nn.Module, optim: Optimization) -> None:
    """Fill ``model`` and all of ``optim`` in place with the tensors of the checkpoint at ``path``.

    Raises:
        ValueError: a damaged checkpoint, or one whose tensors are not those of this model and optimizer.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise Damaged(path, first_line(error)) from None
    _make_room(optim, stored)
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
        tensors[f"model.{layer}.weight"] = whole(codes, step, rows, index, dim, dtype)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def tensors_of(model: nn.Module, optim: Optimization) -> dict[str, Tensor]:
    """Every tensor that the next step depends on, by name. Views, not copies."""
    # Unlike state_dict(), these name a tied weight once: safetensors refuses tensors that share memory.
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {f"model.{name}": tensor.detach() for name, tensor in named}
    for name, parameter in _named_parameters(optim.optimizer):
        for key, value in optim.optimizer.state.get(parameter, {}).items():
            for part, tensor in _parts(key, value).items():
                # safetensors slices need a dimension, which torch's counters lack.
                tensors[f"optim.{name}.{part}"] = tensor.detach().view(tensor.shape or 1)
        if optim.masters is not None and optim.masters.holds(parameter):
            tensors[f"master.{name}"] = parameter.detach()
    if optim.grass is not None:
        tensors |= {f"grass.{name}": gathered for name, gathered in optim.grass.gathered.items()}
        tensors |= {f"history.{name}": tensor for name, tensor in optim.grass.history.tensors().items()}
    if optim.limiter is not None:
        tensors["norm_growth"] = optim.limiter.norms
    return tensors


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        named for group in optimizer.param_groups for named in zip(group["param_names"], group["params"], strict=True)
    ]


def _parts(key: str, value: Any) -> dict[str, Tensor]:
    """The tensor of one state by its key; of torchao's quantised ones the tensors inside, as key.codes and the like."""
    if not isinstance(value, Tensor):
        raise ValueError(f"the optimizer keeps {key} as {type(value).__name__}; only tensors go into a checkpoint")
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
        return {f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
    return {key: value}


def _make_room(optim: Optimization, stored: Mapping[str, Any]) -> None:
    """Give ``optim`` the state tensors that ``stored`` (name → metadata) has and a new optimizer lacks, unfilled."""
    for part in getattr(optim.optimizer, "parts", [optim.optimizer]):
        _make_room_in(part, stored)
    if optim.grass is not None:
        for name, layer in optim.grass.layers.items():
            if f"grass.{name}" in stored:
                optim.grass.gathered[name] = torch.empty(stored[f"grass.{name}"].size, device=layer.weight.device)


def _make_room_in(optimizer: Any, stored: Mapping[str, Any]) -> None:
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in _named_parameters(optimizer):
        state = optimizer.state[parameter]
        for full in [k for k in stored if k.startswith(f"optim.{name}.")]:
            key, _, part = full.removeprefix(f"optim.{name}.").partition(".")
            if part:
                if key not in state:  # torchao's own way to make one
                    state[key] = optimizer._new_buffer(parameter, key == "exp_avg")
                continue
            size, dtype = stored[full].size, stored[full].properties.dtype
            counter = size == (1,) and parameter.shape != (1,)
            device = torch.device("cpu") if counter and not fused else parameter.device
            if size == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=dtype)
            else:
                state[key] = torch.empty(() if counter else size, dtype=dtype, device=device)
