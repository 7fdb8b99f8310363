"""Convert the linear layers of a model to Grass and back."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from models.grass_linear import SIDES, GrassLinear, SharedSlice, side_and_rank
from models.int8_weight import full_weight
from models.rank_split import split_ranks

logger = logging.getLogger(__name__)

ATTENTION = "*.self_attn.*"
ATTENTION_AND_MLP = ("*.self_attn.*_proj", "*.mlp.*_proj")
NEURONS = {"gate_proj": "rows", "up_proj": "rows", "down_proj": "columns"}  # the side of an MLP's neurons
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of one module


def matches(name: str, pattern: str) -> bool:
    """Whether the glob ``pattern`` matches a module's ``name`` (layers.0.mlp.up_proj) or its last part (up_proj)."""
    return fnmatch(name, pattern) or fnmatch(name.rpartition(".")[2], pattern)


def convert_linears(
    model: nn.Module,
    rank: float | Mapping[str, float],
    patterns: Sequence[str] = ATTENTION_AND_MLP,
    side: str | Mapping[str, str] = "auto",
    state_dtype: torch.dtype | None = None,
    share_index: bool = False,
    int8: bool = False,
    attention_weight: float = 1.0,
) -> dict[str, GrassLinear]:
    """Replace in place the ``nn.Linear`` modules whose names match a glob of ``patterns`` by GrassLinear.

    Weights are shared, not copied, unless they become ``int8``. The log lists ranks and unconverted layers.

    Args:
        rank: a number of rows (int) or a share of them (float), as in GrassLinear: one value for all layers, or a
            mapping from globs of names to values. Each layer needs a match, and its last match counts.
        side: "rows" or "columns" of the weight (out, in); "auto" (along its smaller dimension) or "longer" (its larger
            one; both take rows of a square weight); or "neurons": the same rows of gate_proj and up_proj and columns of
            down_proj in an MLP, "auto" elsewhere. Or a mapping as for ``rank``; "auto" for layers without a match.
        state_dtype: of the rows, their gradients and moments; None for the weight's dtype.
        share_index: layers with the same input (q_proj, k_proj and v_proj; gate_proj and up_proj) that select columns
            at the same rank always select the same columns, and keep one slice of the input for all of them.
        int8: keep the weights in 8 bits, see models.int8_weight.
        attention_weight: a factor: attention layers train this many times the share of rows that other layers train,
            at most all rows. The total number of trained elements stays about the same, see models.rank_split. Not used
            if ``rank`` is a mapping.

    Returns:
        The new layers by module name, in model order.

    Raises:
        ValueError: a glob without a match, a matched layer with a bias, a tied weight or no rank, an impossible rank,
            side or ``attention_weight``, or ``share_index`` without layers that can share. The message lists all
            problems; ``model`` is unchanged.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sides = _by_name(side)
    chosen, problems = _sides_and_ranks(model, linears, rank, patterns, sides, attention_weight)
    layers = {
        name: GrassLinear(linears[name].get_parameter("weight"), rank_of_this, side_of_this, state_dtype, int8)
        for name, (side_of_this, rank_of_this) in (chosen if not problems else {}).items()
    }
    if share_index and not problems:
        problems = _share_slices(layers)
    _refuse(problems, layers)
    _tie_neurons(layers, sides)
    _replace(model, layers)
    _log_conversion(layers, linears)
    return layers


@torch.no_grad()
def restore_linears(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, nn.Linear]:
    """Replace in place all GrassLinear modules by plain ``nn.Linear``: the way back from ``convert_linears``.

    Call it between steps: changes of ``rows`` that are not yet in the weights are lost. Weights become trainable again.
    They are shared, not copied, unless they have 8 bits. Optimizers and a ``Grass`` of the old layers cannot be used
    afterwards.

    Args:
        dtype: of weights that were kept in 8 bits; None for the dtype of the rows. Other weights keep their dtype.

    Returns:
        The new layers by module name, in model order; none if the model has no GrassLinear.
    """
    linears: dict[str, nn.Linear] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, GrassLinear):
            continue
        weight: torch.Tensor = layer.weight
        if layer.weight_step is not None:
            wanted = dtype or layer.rows.dtype
            weight = full_weight(weight, layer.weight_step, layer.rows, layer.index, layer.dim, wanted)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach())
        linears[name] = linear.train(layer.training)
    _replace(model, linears)
    return linears


def _log_conversion(layers: Mapping[str, GrassLinear], linears: Mapping[str, nn.Module]) -> None:
    ranks = Counter(layer.rank for layer in layers.values())
    logger.info(
        "converted %d of %d linear layers to Grass: %s; left full-rank: %s",
        *(len(layers), len(linears), ", ".join(f"{count} of rank {rank}" for rank, count in ranks.items())),
        ", ".join(name for name in linears if name not in layers) or "none",
    )


def _replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _sides_and_ranks(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    rank: float | Mapping[str, float],
    patterns: Sequence[str],
    sides: Mapping[str, str],
    attention_weight: float,
) -> tuple[dict[str, tuple[str, int]], dict[str, list[str]]]:
    """By layer its side and rank, and the problems: message → names of the layers that have it."""
    ranks = dict(rank) if isinstance(rank, Mapping) else {"*": rank}
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears)) or "none"
    problems: dict[str, list[str]] = {
        f"optim.{key}: {p!r} matches no linear layer of the model; use names or globs of {known}": []
        for key, globs in (("patterns", patterns), ("side", sides), ("rank", ranks))
        for p in globs
        if not any(matches(name, p) for name in linears)
    }
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    chosen: dict[str, tuple[str, int]] = {}
    for name, linear in linears.items():
        if not any(matches(name, p) for p in patterns):
            continue
        try:
            _require_convertible(linear, tied=holders[id(linear.weight)] > 1)
            ranks_of_this = [r for p, r in ranks.items() if matches(name, p)]
            if not ranks_of_this:
                raise ValueError("optim.rank has no rank for it; add one, or a rank for all other layers as '*'")
            chosen[name] = _side_and_rank_of(name, linear, _last_match(name, sides), ranks_of_this[-1])
        except ValueError as error:
            problems.setdefault(str(error), []).append(name)
    if attention_weight <= 0:
        problems[f"optim.attention_weight={attention_weight} must be above 0; 1 trains the same share everywhere"] = []
    elif attention_weight != 1 and not isinstance(rank, Mapping):
        chosen = _with_more_attention(linears, chosen, attention_weight)
    return chosen, problems


def _by_name(side: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(side, (str, Mapping)):
        raise ValueError(f"optim.side={side} must be {SIDES}, or a mapping from names to these")
    return {"*": side} if isinstance(side, str) else {"*": "auto", **side}


def _last_match(name: str, values: Mapping[str, str]) -> str:
    return [value for pattern, value in values.items() if matches(name, pattern)][-1]


def _side_and_rank_of(name: str, linear: nn.Linear, side: str, rank: float) -> tuple[str, int]:
    """As ``side_and_rank``, and of an MLP's linear with "neurons" their side and number."""
    shape = linear.weight.shape
    found = side_and_rank(shape, "auto" if side == "neurons" else side, rank)
    along = NEURONS.get(name.rpartition(".")[2])
    if side != "neurons" or along is None:
        return found
    return side_and_rank(shape, along, rank if type(rank) is float else found[1] / min(shape))


def _with_more_attention(
    linears: Mapping[str, nn.Linear], chosen: Mapping[str, tuple[str, int]], attention_weight: float
) -> dict[str, tuple[str, int]]:
    """The sides and ranks ``chosen``, with ranks split in favour of attention."""
    shapes = {name: (linears[name].weight.shape, 0 if side == "rows" else 1) for name, (side, _) in chosen.items()}
    ranks = split_ranks(
        {name: rank for name, (_, rank) in chosen.items()},
        {name: (shape[dim], shape[1 - dim]) for name, (shape, dim) in shapes.items()},
        {name: attention_weight if fnmatch(name, ATTENTION) else 1.0 for name in chosen},
    )
    return {name: (side, ranks[name]) for name, (side, _) in chosen.items()}


def _require_convertible(linear: nn.Linear, tied: bool) -> None:
    if linear.bias is not None:
        raise ValueError("has a bias and cannot be converted; narrow optim.patterns")
    if tied:
        raise ValueError(
            "has a tied weight and cannot be converted; leave it out of optim.patterns or, for the head, set "
            "model.tie_word_embeddings=false"
        )


def _share_slices(layers: Mapping[str, GrassLinear]) -> dict[str, list[str]]:
    """Share a slice among the layers of a module with the same input that select columns; or name the problem."""
    siblings: dict[tuple[str, int, int], list[GrassLinear]] = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        for input_of, readers in enumerate(SAME_INPUT):
            if child in readers and layer.side == "columns":
                siblings.setdefault((parent, input_of, layer.rank), []).append(layer)
    groups = [members for members in siblings.values() if len(members) > 1]
    for members in groups:
        shared = SharedSlice(len(members))
        for layer in members:
            layer.shared = layer.index_group = shared
    wanted = " or ".join(", ".join(names) for names in SAME_INPUT)
    problem = f"optim.share_index=true: no module's {wanted} select columns; set optim.side=columns"
    return {} if groups else {problem: []}


def _tie_neurons(layers: Mapping[str, GrassLinear], sides: Mapping[str, str]) -> None:
    """Make the layers of an MLP that select neurons always have the same index."""
    groups: dict[tuple[str, int], object] = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        if child in NEURONS and _last_match(name, sides) == "neurons":
            layer.index_group = groups.setdefault((parent, layer.rank), object())


def _refuse(problems: Mapping[str, list[str]], layers: Mapping[str, GrassLinear]) -> None:
    """Raise ValueError with the ``problems``, if there are any, and leave the weights of ``layers`` as they were."""
    if not problems:
        return
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    raise ValueError("\n".join(_about(names) + message for message, names in problems.items()))


def _about(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: " if names else ""
