"""The selections of r of m rows, by name, as in the paper (Grass, arXiv 2406.17660, section 3.2).

The score g_i of row i is an estimate of the norm of its gradient. ``top_r`` takes the rows with the largest scores, and
``frozen`` does so only once, at the start. Three selections draw rows at random, with probabilities q_i: ``uniform``
1/m, ``multinomial_norm`` ∝ g_i, ``multinomial_norm_sq`` ∝ g_i². They draw r different rows. With the suffix
``_with_replacement``, they draw r times independently, and each drawn row has the weight ρ = 1/√(r q_i), so that
E[PPᵀG] = G for the gradient G (m, n) and the matrix P (m, r) that selects and weights rows. ``cyclic`` is not in the
paper: it selects every row once before it begins a new round over all rows. ``cyclic`` and ``uniform`` need no scores.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.counter_rng import key
from models.grass_linear import GrassLinear

logger = logging.getLogger(__name__)

POWERS = {"uniform": 0, "multinomial_norm": 1, "multinomial_norm_sq": 2}
WITH_REPLACEMENT = "_with_replacement"
TOP = ("top_r", "frozen")
CYCLIC = "cyclic"
SELECTIONS = (*TOP, *POWERS, *(name + WITH_REPLACEMENT for name in POWERS), CYCLIC)


def needs_scores(name: str) -> bool:
    """Whether the selection ``name`` depends on the scores."""
    return name != CYCLIC and POWERS.get(name.removesuffix(WITH_REPLACEMENT)) != 0


class Selected(NamedTuple):
    """A choice of rows.

    Attributes:
        chosen: row numbers (r,) int64, ascending; they may repeat
        scale: the weights ρ of these rows, (r,) float32; None if all are 1
        usable: False if the scores contained no information, so that the rows were drawn uniformly
    """

    chosen: Tensor
    scale: Tensor | None
    usable: bool


def select(name: str, scores: Tensor, rank: int, seed: int, window: int = 0) -> Selected:
    """Choose ``rank`` of m rows by their ``scores`` (m,). This is computed on the CPU in float64.

    The choice depends only on the arguments: equal scores and seeds give equal rows on every process and device. If a
    score is not finite, or all are zero, the scores contain no information: rows are then drawn uniformly without
    replacement. A selection that needs no scores uses only the length of ``scores``.

    Args:
        name: the selection, such as "top_r"; the docstring of this module lists them.
        scores: at least 0, on any device.
        rank: 1 … m.
        seed: seed of the random numbers, 0 ≤ seed < 2**63. For "cyclic", give a layer the same seed in each choice.
        window: how many choices the layer had before; it determines the rows of "cyclic", others ignore it.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SELECTIONS:
        raise ValueError(f"optim.selection={name!r} is unknown; choose from {', '.join(SELECTIONS)}")
    if name == CYCLIC:
        return Selected(_turn(len(scores), rank, seed, window), None, usable=True)
    scores = scores.detach().to("cpu", torch.float64) if needs_scores(name) else torch.ones(len(scores)).double()
    generator = torch.Generator().manual_seed(seed)
    if not (scores.isfinite().all() and scores.max() > 0):
        return Selected(_sample_distinct(torch.ones_like(scores), rank, generator), None, usable=False)
    if name in TOP:
        return Selected(_largest(scores, rank), None, usable=True)
    weights = (scores / scores.max()) ** POWERS[name.removesuffix(WITH_REPLACEMENT)]
    if not name.endswith(WITH_REPLACEMENT):
        return Selected(_sample_distinct(weights, rank, generator), None, usable=True)
    q = weights / weights.sum()
    index = q.multinomial(rank, replacement=True, generator=generator).sort().values
    return Selected(index, (rank * q[index]).rsqrt().float(), usable=True)


def _turn(rows: int, rank: int, seed: int, window: int) -> Tensor:
    """The rows of window ``window``, ascending (rank,), if the windows take all ``rows`` in turn, ``rank`` at a time.

    Every round takes all rows in a new random order. If its last window has too few rows left, the first rows of the
    round fill it up.
    """
    turn, place = divmod(window, -(-rows // rank))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(key(seed, "turn", turn)))
    return order.roll(-place * rank)[:rank].sort().values


def select_layers(
    name: str,
    layers: Mapping[str, GrassLinear],
    scores: Mapping[str, Tensor],
    windows: Mapping[str, int],
    seed: int,
    step: int,
) -> dict[str, Selected]:
    """Choose the rows of several layers after update ``step``.

    Layers that share an index get the same rows, by the row norms of their concatenated gradients. Layers whose scores
    contain no information are logged.

    Args:
        name: the selection, as for ``select``.
        layers: by name; the other mappings have the same names.
        scores: (m,) of each layer, float64 on the CPU.
        windows: the ``window`` of each layer, as for ``select``.
        seed: the seed of the run.
    """
    sharing: dict[Any, list[str]] = {}
    for n in layers:
        sharing.setdefault(layers[n].index_group or n, []).append(n)
    draw = () if name == CYCLIC else (step,)
    selected: dict[str, Selected] = {}
    for group in sharing.values():
        first = group[0]
        joint = scores[first] if len(group) == 1 else torch.stack([scores[n] for n in group]).norm(dim=0)
        found = select(name, joint, layers[first].rank, key(seed, "select", *draw, first), windows[first])
        if not found.usable:
            logger.warning("step %d: %s has no usable row scores; drew rows uniformly", step, first)
        selected |= dict.fromkeys(group, found)
    return selected


def _largest(scores: Tensor, rank: int) -> Tensor:
    """The positions of the ``rank`` largest of ``scores`` (m,), ascending (rank,).

    Of equal scores the first count, as in a stable sort, so that ties have the same result everywhere.
    """
    least = scores.topk(rank).values[-1]
    above, ties = scores > least, scores == least
    return (above | (ties & (ties.cumsum(0) <= rank - above.sum()))).nonzero().view(-1)


def _sample_distinct(weights: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """``rank`` distinct indices, drawn without replacement in proportion to ``weights``; ascending (rank,).

    By exponential keys (Efraimidis and Spirakis 2006). Rows of weight zero come last, in uniform order.
    """
    keys = torch.empty_like(weights).exponential_(generator=generator)
    by_key = (keys / torch.where(weights > 0, weights, 1.0)).argsort()
    zeros_last = by_key[(weights[by_key] == 0).to(torch.int8).argsort(stable=True)]
    return zeros_last[:rank].sort().values
