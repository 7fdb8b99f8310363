"""Copy named weights into a model."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.dtensor import copy_local_part
from models.int8_weight import quantise

logger = logging.getLogger(__name__)


@torch.no_grad()
def fill_weight(model: nn.Module, name: str, full: Tensor) -> None:
    """Copy ``full`` into a weight of ``model``, which may be sharded or in 8 bits.

    Args:
        name: the name of the parameter, such as layers.0.mlp.up_proj.weight.
        full: the complete weight, on any device and in any dtype.
    """
    weight = model.get_parameter(name)
    if weight.dtype != torch.int8:
        copy_local_part(weight, full)
        return
    layer: Any = model.get_submodule(name.rpartition(".")[0])
    codes, step = quantise(full, layer.dim)
    weight.copy_(codes)
    layer.weight_step.copy_(step)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first ``most`` of ``names`` and the number of further names, for messages: "a, b and 3 more"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def fill_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], origin: object) -> None:
    """Copy the weights of a complete model into ``model``, which keeps its dtypes.

    Args:
        weights: (name, complete tensor) of every weight; a head tied to the embeddings may be left out.
        origin: the source of the weights, for messages.

    Raises:
        ValueError: an unknown or missing weight, or a weight of another shape. Earlier weights are then already copied.
    """
    # All other tensors of Grass layers are derived from their weights.
    own = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith("weight")}
    missing, casts = set(own), set[str]()
    for name, tensor in weights:
        if name not in own:
            raise ValueError(f"{origin}: {name} does not exist in the model; check model.*")
        if (expected := own[name].shape) != tensor.shape:
            shapes = f"has shape {tuple(tensor.shape)}, but the model expects {tuple(expected)}"
            raise ValueError(f"{origin}: {name} {shapes}; check model.*")
        if tensor.dtype != own[name].dtype:
            casts.add(f"{tensor.dtype} to {own[name].dtype}")
        fill_weight(model, name, tensor)
        missing.discard(name)
    if getattr(model, "tie_word_embeddings", False):
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"{origin} lacks {listed(sorted(missing))}; check model.*")
    logger.info("loaded the weights of %s%s", origin, f", cast from {', '.join(sorted(casts))}" if casts else "")
