"""Convert the linears of a model to Grass."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from models.grass_linear import GrassLinear, SharedSlice

logger = logging.getLogger(__name__)

ATTENTION_AND_MLP = ("*.self_attn.*_proj", "*.mlp.*_proj")
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one module


def matches(name: str, pattern: str) -> bool:
    """Whether a glob names this module, by its full name or by the last part of it."""
    return fnmatch(name, pattern) or fnmatch(name.rpartition(".")[2], pattern)


def convert_linears(
    model: nn.Module,
    rank: int | Mapping[str, int],
    patterns: Sequence[str] = ATTENTION_AND_MLP,
    side: str | Mapping[str, str] = "auto",
    state_dtype: torch.dtype | None = None,
    share_index: bool = False,
    int8: bool = False,
) -> dict[str, GrassLinear]:
    """Swap in place the ``nn.Linear`` modules whose names match a glob of ``patterns`` for GrassLinear.

    Weights are shared, not copied, unless they become ``int8``. What was converted and what was left is logged.
    ``side`` and ``rank`` are one for all, or one for each glob of names that they map, the last match winning; ``side``
    is "auto" without any. With ``share_index`` those of SAME_INPUT of one rank that select columns share one index, and
    one slice of their input.

    Returns:
        The new layers by module name, in model order.

    Raises:
        ValueError: a pattern that matches no linear layer, a matched layer with a bias or a tied weight, or an
            impossible rank or side, or ``share_index`` where nothing can share; all problems at once, and the model is
            left as it was.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    problems: dict[str, list[str]] = {}  # message → names of the layers it is about
    if not isinstance(side, (str, Mapping)):
        raise ValueError(f"optim.side={side} is neither auto, rows or columns nor one of these for each name")
    sides = {"*": side} if isinstance(side, str) else {"*": "auto", **side}
    ranks = dict(rank) if isinstance(rank, Mapping) else {"*": rank}
    for p in [*patterns, *sides, *ranks]:
        if not any(matches(name, p) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears)) or "none"
            problems[f"pattern {p!r} matches no linear layer of the model, which has {known}"] = []
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers: dict[str, GrassLinear] = {}
    for name, linear in linears.items():
        if not any(matches(name, p) for p in patterns):
            continue
        try:
            if linear.bias is not None:
                raise ValueError("has a bias and cannot be converted; narrow optim.patterns")
            if holders[id(linear.weight)] > 1:
                raise ValueError(
                    "has a tied weight and cannot be converted; leave it out of optim.patterns or, for the head, set "
                    "model.tie_word_embeddings=false"
                )
            side_of_this = [s for p, s in sides.items() if matches(name, p)][-1]
            ranks_of_this = [r for p, r in ranks.items() if matches(name, p)]
            if not ranks_of_this:
                raise ValueError("optim.rank names no rank for it; add one, or one for all others as '*'")
            layers[name] = GrassLinear(linear.weight, ranks_of_this[-1], side_of_this, state_dtype, int8)
        except ValueError as error:
            problems.setdefault(str(error), []).append(name)
    if share_index and not _share_slices(layers) and not problems:
        pairs = " or ".join(", ".join(names) for names in SAME_INPUT)
        problems[f"optim.share_index=true: no {pairs} of one module select columns; set optim.side=columns"] = []
    if problems:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        raise ValueError("\n".join(_about(names) + message for message, names in problems.items()))
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    left = [name for name in linears if name not in layers]
    logger.info(
        "converted %d of %d linear layers to Grass (rank %s); left full-rank: %s",
        *(len(layers), len(linears), rank, ", ".join(left) or "none"),
    )
    return layers


def _share_slices(layers: Mapping[str, GrassLinear]) -> int:
    """Let the layers of one module that read the same input and select columns share a slice; how many slices."""
    siblings: dict[tuple[str, int, int], list[GrassLinear]] = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        for input_of, readers in enumerate(SAME_INPUT):
            if child in readers and layer.side == "columns":
                siblings.setdefault((parent, input_of, layer.rank), []).append(layer)
    together = [members for members in siblings.values() if len(members) > 1]
    for members in together:
        shared = SharedSlice(len(members))
        for layer in members:
            layer.shared = shared
    return len(together)


def _about(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: " if names else ""
