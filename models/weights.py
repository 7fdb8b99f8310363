"""Copy named weights into a model."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.dtensor import copy_local_part
from models.int8_weight import quantise

logger = logging.getLogger(__name__)


@torch.no_grad()
def fill_weight(model: nn.Module, name: str, full: Tensor) -> None:
    """Copy ``full`` into the weight ``name`` of ``model``, which may be sharded or in 8 bits.

    Args:
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


@torch.no_grad()
def fill_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], origin: object) -> None:
    """Copy all ``weights`` of a model into ``model``, in the model's dtypes.

    Args:
        weights: (name, complete tensor); every weight of the model once, a tied head is optional.
        origin: of the weights, for messages.

    Raises:
        ValueError: an unknown or missing weight, or one of another shape.
    """
    # Whatever else Grass layers hold is derived from their weights.
    own = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith("weight")}
    missing, casts = set(own), set[str]()
    for name, tensor in weights:
        if name not in own or own[name].shape != tensor.shape:
            wanted = f"shape {tuple(own[name].shape)}" if name in own else "no such weight"
            raise ValueError(f"{origin}: {name} has shape {tuple(tensor.shape)}, the model {wanted}; check model.*")
        if tensor.dtype != own[name].dtype:
            casts.add(f"{tensor.dtype} to {own[name].dtype}")
        fill_weight(model, name, tensor)
        missing.discard(name)
    if getattr(model, "tie_word_embeddings", False):
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(sorted(missing)[:4])} …; check model.*")
    logger.info("loaded the weights of %s%s", origin, f", cast from {', '.join(sorted(casts))}" if casts else "")
