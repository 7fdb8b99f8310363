"""The optimizer's state of a layer's rows when the rows change.

``reset`` drops it: the inner optimizer starts again on the new rows, as in the paper (arXiv 2406.17660).

``carry`` keeps the state of the rows that stay. A new row starts with first moment zero. Its second moment starts at

    mean    the mean over the rows selected before, element by element
    score   g_i² / (n s) in every element, for a row of n elements with the score g_i of s probed steps; without
            scores, as mean
    zero    zero

Adam counts steps per matrix, so that rows of different ages share one bias correction. A second moment that starts at
an estimate needs no correction. A first moment that starts at zero is not corrected for the age of its row: a new row's
first steps are small and grow to full size over about 1 / (1 - β₁) updates, which warms up each new row.

NorMuon keeps the mean square of each row (output neuron) of its orthogonalised step, (rows, 1). If a layer selects
rows, the mean squares move with the rows, and a new row starts at the mean over the rows selected before, for any
setting: a mean square of the step is no moment of a gradient, so neither a score nor ρ applies to it, and zero would
make the row's first steps too large. If a layer selects columns, this state does not change.

Only such mean squares and known averages of gradients or of their squares, element by element, can be carried. All
other state (factored or quantised moments, Rprop's step sizes) is reset, with a warning.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.dtensor import local
from models.grass_linear import GrassLinear
from models.row_updates import Change, positions_among

logger = logging.getLogger(__name__)

POLICIES = ("reset", "carry")
NEW_SECOND_MOMENTS = ("mean", "score", "zero")
# Names in torch.optim of averages (Adamax: a maximum) of gradients, and averages (Adagrad: the sum) of their squares.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "exp_inf")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
WITHOUT_SECOND_MOMENTS = (torch.optim.Muon, torch.optim.SGD)
# Names of mean squares of the step's rows, (rows, 1).
MEAN_SQUARES_OF_ROWS = ("row_mean_square",)


class StateAtRefresh:
    """Resets or carries the optimizer's state when a layer's rows change; the docstring of this module says how.

    Args:
        optimizer: holds the rows and their state.
        policy: "reset" or "carry".
        new_second_moment: "mean", "score" or "zero", for "carry".
        probe_steps: the number of gradients summed in a score.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, policy: str, new_second_moment: str, probe_steps: int):
        for option, value, known in (
            ("state_at_refresh", policy, POLICIES),
            ("new_second_moment", new_second_moment, NEW_SECOND_MOMENTS),
        ):
            if value not in known:
                raise ValueError(f"optim.{option}={value} is unknown; choose from {', '.join(known)}")
        self.optimizer, self.policy, self.new_second_moment = optimizer, policy, new_second_moment
        self.probe_steps, self._warned = probe_steps, False

    def may_use_scores(self, rows: Iterable[Tensor]) -> bool:
        """Whether ``uses_scores`` may be true after the first step: not if only Muon and SGD step on ``rows``."""
        if self.policy != "carry" or self.new_second_moment != "score":
            return False
        known = {
            p
            for part in getattr(self.optimizer, "parts", [self.optimizer])
            for group in (part.param_groups if isinstance(part, WITHOUT_SECOND_MOMENTS) else ())
            for p in group["params"]
        }
        return not known.issuperset(rows)

    def uses_scores(self, rows: Iterable[Tensor]) -> bool:
        """Whether ``update`` uses the scores of ``rows``: only if the state has second moments that start from them."""
        if self.policy != "carry" or self.new_second_moment != "score":
            return False
        states = (self.optimizer.state.get(p) for p in rows)
        return any(name in SECOND_MOMENTS for name in next((state for state in states if state), ()))

    def update(self, layers: Sequence[GrassLinear], change: Change, norms: Sequence[Tensor | None]) -> None:
        """Carry or drop the state of ``layers`` after the ``change`` of their rows.

        Args:
            layers: of one shape and dtype.
            change: the old and the new selection of ``layers``.
            norms: by layer the estimated norms (m,) of its rows' gradients, summed over ``probe_steps`` steps; None for
                a layer that was not probed.
        """
        # A shard of the rows, and of their state, holds the complete selected dimension: each shard is carried locally.
        held = [self.optimizer.state.get(layer.rows, {}) for layer in layers]
        states = [{k: local(t) if torch.is_tensor(t) else t for k, t in state.items()} for state in held]
        having = [number for number, state in enumerate(states) if state]
        if not having:
            return
        shape = local(layers[0].rows).shape
        carried = self.policy == "carry"
        if carried and not all(can_be_carried(states[n], shape) for n in having):
            self._warn_once(states[having[0]])
            carried = False
        if not carried:
            for n in having:
                del self.optimizer.state[layers[n].rows]
            return
        # The square of a sum over probe_steps gradients grows like their number: most of a gradient is noise.
        elements = self.probe_steps * layers[0].weight.numel() // layers[0].selectable
        known = [n for n in norms if n is not None]
        mean_square = None
        if len(known) == len(layers):
            mean_square = torch.stack(known).gather(1, change.new_index).square() / elements
        same_names = len({tuple(states[n]) for n in having}) == 1
        for numbers in [having] if same_names else [[n] for n in having]:
            part = change if len(numbers) == len(layers) else change.of(numbers)
            score = mean_square
            if mean_square is not None and part is not change:
                score = torch.stack([mean_square[n] for n in numbers])
            carry([states[n] for n in numbers], part, self.new_second_moment, score)

    def _warn_once(self, state: dict[str, Any]) -> None:
        if not self._warned:
            logger.warning(
                "optim.state_at_refresh=carry has no effect with %s: its state (%s) has values that belong to more "
                "than one element or row and cannot be carried, so every refresh resets it",
                *(type(self.optimizer).__name__, ", ".join(state)),
            )
        self._warned = True


def can_be_carried(state: dict[str, Any], shape: torch.Size) -> bool:
    """Whether ``state``, of rows with ``shape``, has only tensors that can follow the rows when others are selected.

    These are counts, known moments with this shape, and NorMuon's mean squares (shape[0], 1).
    """
    shapes = dict.fromkeys((*FIRST_MOMENTS, *SECOND_MOMENTS), shape)
    shapes |= dict.fromkeys(MEAN_SQUARES_OF_ROWS, torch.Size((shape[0], 1)))
    return all(
        t.shape == shapes.get(name) and not is_traceable_wrapper_subclass(t)
        for name, t in state.items()
        if torch.is_tensor(t) and t.ndim > 0
    )


@torch.no_grad()
def carry(states: Sequence[dict[str, Any]], change: Change, new_second_moment: str, score: Tensor | None) -> None:
    """Turn the states of the old rows into those of the new rows, in place.

    If the factor ρ on the gradient of a row becomes ρ', first moments are multiplied by ρ'/ρ, and second moments by
    (ρ'/ρ)². Mean squares of the step do not depend on ρ. A mean over the old rows is taken of their moments for ρ = 1.

    Args:
        states: the inner optimizer's state of the rows of each layer of ``change``; all pass ``can_be_carried`` and
            hold the same moments.
        change: the old and the new selection of the layers.
        new_second_moment: "mean", "score" or "zero".
        score: (layers, rank) estimated mean square of the gradient elements of each new row, for "score"; None if it is
            not known.
    """
    along = 2 - change.dim  # to broadcast one number per selected row, in a stack of layers
    position, stays = (t.unsqueeze(along) for t in positions_among(change.old_index, change.new_index))
    for name, moment in states[0].items():
        if not torch.is_tensor(moment) or moment.ndim == 0:
            continue
        of_step, second = name in MEAN_SQUARES_OF_ROWS, name in SECOND_MOMENTS
        if of_step and change.dim == 1:
            continue
        power = 0 if of_step else 2 if second else 1  # of ρ
        moments = [state[name] for state in states]
        of_gradient = torch.stack(moments)
        if change.old_scale is not None:
            of_gradient = of_gradient / (change.old_scale**power).unsqueeze(along)
        kept = of_gradient.take_along_dim(position, 1 + change.dim)
        fresh = torch.zeros_like(kept)
        if second and new_second_moment == "score" and score is not None:
            fresh = score.unsqueeze(along).expand_as(kept)
        elif of_step or (second and new_second_moment != "zero"):
            fresh = of_gradient.mean(1 + change.dim, keepdim=True).expand_as(kept)
        found = torch.where(stays, kept, fresh)
        if change.new_scale is not None:
            found = found * (change.new_scale**power).unsqueeze(along)
        torch._foreach_copy_(moments, list(found.unbind()))
