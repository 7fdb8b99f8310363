"""A linear layer that trains only selected rows (or columns), and computes only their part of the weight gradient.

``GrassLinear`` computes ``y = x Wᵀ`` with a frozen ``weight``. Its only trainable parameter is ``rows``, a copy of the
selected slice of the weight. Its backward computes ρ·dY[:, index]ᵀ X (Grass, arXiv 2406.17660, section 3), where ρ is a
factor per row, 1 unless rows are drawn with weights. The (out, in) gradient is formed only to score rows exactly, while
a probe runs. Optimizers, clipping, accumulation, DDP and FSDP use only ``rows``.

Between steps ``weight[index] == rows`` (in the weight's dtype, unless it has 8 bits); ``optim.grass`` maintains this.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.counter_rng import random_signs
from models.dtensor import local
from models.int8_weight import full_weight, quantise
from models.row_updates import fold_rows, select_rows, selected

logger = logging.getLogger(__name__)

SIDES = "auto, longer, rows, columns or neurons"


class _SelectedLinear(torch.autograd.Function):
    """``F.linear`` that computes the weight gradient of the selected slice and, while probing, the row scores."""

    @staticmethod
    def forward(ctx, x, x_slice, weight, weight_step, rows, index, scale, probe, probe_key, columns):
        ctx.columns, ctx.probe_width = columns, probe.shape[1:] if probe is not None else None
        ctx.rows_dtype, ctx.x_is_sliced = rows.dtype, x_slice is not None
        kept_rows = None if weight_step is None else rows
        ctx.save_for_backward(
            x_slice if ctx.x_is_sliced else x, weight, weight_step, kept_rows, index, scale, probe_key
        )
        if weight_step is not None:
            weight = full_weight(weight, weight_step, rows, index, int(columns), x.dtype)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad_y):
        saved, weight, weight_step, rows, index, scale, probe_key = ctx.saved_tensors
        if weight_step is not None:
            weight = full_weight(weight, weight_step, rows, index, int(ctx.columns), grad_y.dtype)
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        del weight
        dy, x = grad_y.flatten(0, -2), saved.flatten(0, -2)
        grad_rows = grad_probe = None
        if ctx.needs_input_grad[4]:
            if ctx.columns:
                grad_rows = _product(dy.T, x if ctx.x_is_sliced else x.index_select(1, index), ctx.rows_dtype)
            else:
                grad_rows = _product(dy.index_select(1, index).T, x, ctx.rows_dtype)
            if scale is not None:
                grad_rows = grad_rows * (scale if ctx.columns else scale.unsqueeze(1))
        if ctx.probe_width is not None:
            selected, other = (x, dy) if ctx.columns else (dy, x)
            grad_probe = _probe_gradient(selected, other, ctx.probe_width, probe_key)
        return grad_x, None, None, None, grad_rows, None, None, grad_probe, None, None


def _probe_gradient(selected: Tensor, other: Tensor, width: Sequence[int], key: Tensor) -> Tensor:
    """The contribution of a backward to the probe, float32, from the factors of the gradient G (m, n).

    Without a width: the squared norms of the rows of G (m,), computed from the complete G. With width k: the sketch GΩ
    (m, k), where Ω (n, k) has random signs, at k (1/m + 1/n) of the cost. The sketch is linear in G, so it can be
    summed over batches and processes.

    Args:
        selected: (tokens, m); G = selectedᵀ @ other.
        other: (tokens, n).
        width: () or (k,).
        key: int64 scalar, the key of the random signs.
    """
    if not width:
        wide = torch.promote_types(other.dtype, torch.float32)
        return torch.linalg.vector_norm(selected.T @ other, dim=1, dtype=wide).square().float()
    omega = random_signs(key, other.shape[1], width[0], like=other)
    return _product(selected.T, other @ omega, torch.float32)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``. On a GPU, a float32 result of bfloat16 factors is not rounded to bfloat16 first."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


class SharedSlice:
    """One slice ``x[..., index]`` for ``members`` layers that have the same input ``x`` and select the same columns.

    The first layer that is called makes the slice. After the last one, this object no longer refers to the slice, so
    that only the autograd graphs of the layers keep it.
    """

    def __init__(self, members: int):
        self.members, self.left = members, 0
        self.x: Tensor | None = None
        self.slice: Tensor | None = None

    def of(self, x: Tensor, index: Tensor) -> Tensor:
        """The slice (…, rank) of ``x`` (…, in) at ``index`` (rank,). The calls of all members with ``x`` share it."""
        if self.x is not x or self.slice is None:
            self.x, self.slice, self.left = x, x.detach().index_select(-1, index), self.members
        found = self.slice
        self.left -= 1
        if self.left == 0:
            self.x = self.slice = None
        return found


class GrassLinear(nn.Module):
    """A bias-free linear layer that trains ``rank`` of its rows (output features) or columns (input features).

    Attributes:
        weight: Parameter (out, in), frozen, used by the forward; with ``int8`` int8 codes (see models.int8_weight), and
            those of selected rows are out of date: the forward uses ``rows`` for them
        rows: Parameter (rank, in) for rows, (out, rank) for columns: the trainable copy of the selected slice
        index: buffer (rank,) int64: the selected rows or columns, ascending; entries may repeat
        scale: buffer (rank,) float32: the factor ρ on the gradient of each selected row or column
        scaled: whether ``scale`` is used; False unless rows are drawn with weights
        weight_step: with ``int8`` a buffer (size of the selected dimension,) float32: see models.int8_weight

    Args:
        weight: the (out, in) weight; shared, not copied, and frozen. With ``int8`` it is only read.
        rank: the number of trained rows or columns, an int from 1 to the size of the selected dimension; or their
            share, a float, 0 < rank ≤ 1.
        side: "rows", "columns", "auto" (along the smaller dimension, as in the paper) or "longer" (along the larger
            one); of a square weight "auto" and "longer" take rows.
        state_dtype: dtype of ``rows``, and so of its gradient and moments; None for the weight's dtype.
        int8: keep the weight in 8 bits, rounded to nearest; each forward and backward dequantises it.

    Raises:
        ValueError: an unknown side or an impossible rank.
    """

    index: Tensor
    scale: Tensor
    weight: Tensor
    weight_step: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        rank: float,
        side: str = "auto",
        state_dtype: torch.dtype | None = None,
        int8: bool = False,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.side, rank = side_and_rank(weight.shape, side, rank)
        self.dim = 0 if self.side == "rows" else 1
        self.register_buffer("weight_step", None)
        if int8:
            codes, self.weight_step = quantise(weight.detach(), self.dim)
            self.weight = nn.Parameter(codes, requires_grad=False)
        else:
            self.weight = weight.requires_grad_(False)
        self.register_buffer("index", torch.arange(rank, device=weight.device))
        self.register_buffer("scale", torch.ones(rank, device=weight.device))
        self.rows = nn.Parameter(selected(self, self.index, state_dtype or weight.dtype))
        self.scaled = False
        self.index_group: object | None = None  # layers of one group always have the same index
        self.shared: SharedSlice | None = None  # with layers of the group that have the same input
        self.probe: Tensor | None = None  # a leaf that is not in parameters(), for DDP, FSDP and the optimizer
        self.probe_key: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in the dtype of ``x``. Unless ``int8`` is set, that must be the dtype of the weight."""
        scale = self.scale if self.scaled else None
        return _SelectedLinear.apply(
            x, self._slice_of(x), self.weight, self.weight_step, self.rows, self.index, scale, self.probe,
            self.probe_key, self.dim == 1,
        )  # fmt: skip

    def _slice_of(self, x: Tensor) -> Tensor | None:
        """The slice of ``x`` that the backward needs; None if it needs all of ``x`` (for rows, or while probing)."""
        if self.dim == 0 or self.probe is not None or not torch.is_grad_enabled():
            return None
        return self.shared.of(x, self.index) if self.shared else x.detach().index_select(-1, self.index)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, side={self.side}"

    @property
    def rank(self) -> int:
        """The number of selected rows (or columns)."""
        return self.index.numel()

    @property
    def selectable(self) -> int:
        """The size of the selected dimension: the number of rows (or columns) to choose from."""
        return self.weight.shape[self.dim]

    @torch.no_grad()
    def reset(self) -> None:
        """Select the first ``rank`` rows (or columns), and copy them from the weight into ``rows``.

        Call it if the weight gets its values after the layer was built, for example on the meta device.
        """
        self.index.copy_(torch.arange(self.rank, device=self.index.device))
        self.scale.fill_(1)
        rows = local(self.rows)
        rows.copy_(selected(self, self.index, rows.dtype))

    @torch.no_grad()
    def fold(self, stepped: Tensor | None = None, rounding_key: int = 0) -> None:
        """Write ``rows`` into the weight after a step: weight[index] = rows, rounded to nearest.

        8-bit weights stay unchanged until the selection changes. float32 rows of a bfloat16 weight are master copies:
        they keep the digits that the weight cannot store.

        Args:
            stepped: new values for ``rows``, for example from ``stepped_draws``. They are first copied into ``rows``,
                with stochastic rounding if that has dtype bfloat16. None if they are already there.
            rounding_key: the key of the random numbers of the stochastic rounding, see models.counter_rng.
        """
        fold_rows([self], [stepped], [rounding_key])

    @torch.no_grad()
    def stepped_draws(self, before: Tensor, decay: float, after: Tensor) -> Tensor:
        """The new values of ``rows`` that were drawn with weights ρ: w ← decay·w + Σ ρΔ, in float32 or wider.

        Each entry of ``index`` is a draw. The sum is over all draws of the same row. Δ is the optimizer's step on a
        draw, without weight decay.

        Args:
            before: the rows before the step, in the shape of ``rows``.
            decay: the factor of decoupled weight decay in the step.
            after: the rows after the optimizer's step, in the same shape.
        """
        before, after, scale = local(before), local(after), self.scale.unsqueeze(1 - self.dim)
        kept = before.to(torch.promote_types(before.dtype, torch.float32)) * decay
        steps = (after - kept) * scale
        first = torch.searchsorted(self.index, self.index)  # the first draw of each draw's row
        summed = torch.zeros_like(steps).index_add_(self.dim, first, steps)
        return kept + summed.index_select(self.dim, first)

    def select(self, index: Tensor, scale: Tensor | None = None, rounding_key: int = 0) -> None:
        """Select the rows (or columns) ``index`` and load them from the weight, see ``models.row_updates.select_rows``.

        Args:
            index: (rank,) int64, ascending.
            scale: the factors ρ on their gradients, (rank,) float32; None if all are 1.
            rounding_key: the key of the random numbers with which the previous rows are rounded into the weight.
        """
        for _ in select_rows([self], [index], [scale], [rounding_key]):
            pass

    def start_probe(self, key: Tensor | int, width: int | None) -> None:
        """From the next forward on, each backward also adds scores of all rows to ``probe.grad``, until ``stop_probe``.

        Args:
            key: the key of the sketch's random matrix, an int or an int64 scalar tensor on the weight's device.
            width: k, to sketch the gradient by its product with a random matrix of k columns. None for the squared
                norms of the gradient's rows.
        """
        shape = (self.selectable,) if width is None else (self.selectable, width)
        self.probe = torch.empty(shape, device=self.weight.device, requires_grad=True)  # only its gradient has a value
        self.probe_key = key if isinstance(key, Tensor) else torch.full((), key, device=self.weight.device)

    def stop_probe(self) -> Tensor:
        """End the probe and return its sum over all backwards, in float32, zero if there was none.

        For m rows to choose from, it is (m,) squared norms, or a sketch (m, k).
        """
        assert self.probe is not None
        gathered = self.probe.grad if self.probe.grad is not None else torch.zeros_like(self.probe)
        self.probe = self.probe_key = None
        return gathered.detach()


def side_and_rank(shape: torch.Size, side: str, rank: float) -> tuple[str, int]:
    """The side, "rows" or "columns", and the number of rows (or columns) that a GrassLinear trains.

    Args:
        shape: (out, in) of the weight.
        side: as for GrassLinear.
        rank: as for GrassLinear.

    Raises:
        ValueError: an unknown side or an impossible rank.
    """
    if side not in ("auto", "longer", "rows", "columns"):
        raise ValueError(f"optim.side={side!r} is unknown; use {SIDES}")
    if side in ("auto", "longer"):
        side = "rows" if shape[0] == shape[1] or (shape[0] > shape[1]) == (side == "longer") else "columns"
    size = shape[0 if side == "rows" else 1]
    number = max(1, round(rank * size)) if type(rank) is float and 0 < rank <= 1 else rank
    if type(number) is not int or not 1 <= number <= size:
        raise ValueError(
            f"optim.rank={rank} must be between 1 and {size}, the number of {side} of a {tuple(shape)} weight, or a "
            "share such as 0.25"
        )
    return side, number
