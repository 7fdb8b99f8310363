"""What becomes of a layer's optimizer state when its rows change.

``reset`` drops it: the inner optimizer starts afresh on the new rows, as in the paper.

``carry`` keeps the state of the rows that stay. A new row starts with no first moment and, as second moment, one of

    mean    the mean over the rows selected before, element by element
    score   what the score says its squared gradient is: g_i² / n in every element
    zero

Adam counts its steps once for the whole matrix, so rows of different age share one bias correction. A second moment
that starts at an estimate needs none; a first moment that starts at zero under a count that runs on makes a new row's
first steps small, growing to full size over about 1 / (1 - β₁) updates: each new row warms up by itself.

Only what is known to be an average of gradients or of their squares, element by element, can be carried. All else
(factored or quantised moments, Rprop's step sizes) is reset, and ``optim.grass`` says so.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.grass_linear import positions_among

POLICIES = ("reset", "carry")
NEW_SECOND_MOMENTS = ("mean", "score", "zero")
# What torch.optim calls averages (Adamax: a maximum) of gradients, and averages (Adagrad: the sum) of their squares.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "exp_inf")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


class Change(NamedTuple):
    """A change of rows: index (r,) and ρ (r,) before and after, sorted by index; ``dim`` is the selected dimension."""

    old_index: Tensor
    new_index: Tensor
    old_scale: Tensor
    new_scale: Tensor
    dim: int


def can_be_carried(state: dict[str, Any], shape: torch.Size) -> bool:
    """Whether every tensor of ``state`` but counts is a known moment of the rows, element by element."""
    return all(
        name in (*FIRST_MOMENTS, *SECOND_MOMENTS) and not is_traceable_wrapper_subclass(t) and t.shape == shape
        for name, t in state.items()
        if torch.is_tensor(t) and t.ndim > 0
    )


@torch.no_grad()
def carry(state: dict[str, Any], change: Change, new_second_moment: str, score: Tensor) -> None:
    """Make ``state`` that of the new rows, in place.

    A moment of ρG becomes one of ρ'G: first moments are multiplied by ρ'/ρ, second moments by its square, and the mean
    over the rows selected before is that of G itself.

    Args:
        state: the inner optimizer's state of ``rows``, which ``can_be_carried``.
        new_second_moment: a name of NEW_SECOND_MOMENTS.
        score: (r,) estimated mean square of a gradient element of each new row, for "score".
    """
    position, stays = positions_among(change.old_index, change.new_index)
    for name, moment in state.items():
        if not torch.is_tensor(moment) or moment.ndim == 0:
            continue
        second = name in SECOND_MOMENTS
        along = [-1 if d == change.dim else 1 for d in range(moment.ndim)]
        old_scale, new_scale = ((s**2 if second else s).view(along) for s in (change.old_scale, change.new_scale))
        of_gradient = moment / old_scale
        kept = of_gradient.index_select(change.dim, position)
        fresh = torch.zeros_like(kept)
        if second and new_second_moment == "mean":
            fresh = of_gradient.mean(change.dim, keepdim=True).expand_as(kept)
        elif second and new_second_moment == "score":
            fresh = score.view(along).expand_as(kept)
        moment.copy_(torch.where(stays.view(along), kept, fresh) * new_scale)
