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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.row_updates import Change, positions_among

POLICIES = ("reset", "carry")
NEW_SECOND_MOMENTS = ("mean", "score", "zero")
# What torch.optim calls averages (Adamax: a maximum) of gradients, and averages (Adagrad: the sum) of their squares.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "exp_inf")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def can_be_carried(state: dict[str, Any], shape: torch.Size) -> bool:
    """Whether every tensor of ``state`` but counts is a known moment of the rows, element by element."""
    return all(
        name in (*FIRST_MOMENTS, *SECOND_MOMENTS) and not is_traceable_wrapper_subclass(t) and t.shape == shape
        for name, t in state.items()
        if torch.is_tensor(t) and t.ndim > 0
    )


@torch.no_grad()
def carry(states: Sequence[dict[str, Any]], change: Change, new_second_moment: str, score: Tensor) -> None:
    """Make ``states`` those of the new rows, in place.

    A moment of ρG becomes one of ρ'G: first moments are multiplied by ρ'/ρ, second moments by its square, and the mean
    over the rows selected before is that of G itself.

    Args:
        states: the inner optimizer's states of the rows of each layer of ``change``, which ``can_be_carried`` and hold
            the same moments.
        new_second_moment: a name of NEW_SECOND_MOMENTS.
        score: (layers, rank) estimated mean square of a gradient element of each new row, for "score".
    """
    along = 2 - change.dim  # a number for each selected row, of a stack of layers
    position, stays = (t.unsqueeze(along) for t in positions_among(change.old_index, change.new_index))
    for name, moment in states[0].items():
        if not torch.is_tensor(moment) or moment.ndim == 0:
            continue
        second = name in SECOND_MOMENTS
        moments = [state[name] for state in states]
        of_gradient = torch.stack(moments)
        if change.old_scale is not None:
            of_gradient = of_gradient / _factor(change.old_scale, second).unsqueeze(along)
        kept = of_gradient.take_along_dim(position, 1 + change.dim)
        fresh = torch.zeros_like(kept)
        if second and new_second_moment == "mean":
            fresh = of_gradient.mean(1 + change.dim, keepdim=True).expand_as(kept)
        elif second and new_second_moment == "score":
            fresh = score.unsqueeze(along).expand_as(kept)
        found = torch.where(stays, kept, fresh)
        if change.new_scale is not None:
            found = found * _factor(change.new_scale, second).unsqueeze(along)
        torch._foreach_copy_(moments, list(found.unbind()))


def _factor(scale: Tensor, second: bool) -> Tensor:
    return scale**2 if second else scale
