"""A linear layer that trains a selection of its rows (or columns) and computes the gradient of nothing else.

``GrassLinear`` computes ``y = x Wᵀ`` with a frozen ``weight`` and hands autograd an ordinary small parameter, ``rows``:
the trainable copy of the selected slice of the weight. Its backward forms ρ·dY[:, index]ᵀ X (Grass, arXiv 2406.17660,
section 3), never the (out, in) gradient. Optimizers, clipping, accumulation, DDP and FSDP see only ``rows``.

Between steps ``weight[index] == rows`` (in the weight's dtype); ``optim.grass`` keeps that true.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.counter_rng import random_signs
from models.dtensor import local
from models.int8_weight import quantise, whole
from models.row_updates import fold_rows, positions, select_rows, selected

logger = logging.getLogger(__name__)


class _SelectedLinear(torch.autograd.Function):
    """``F.linear`` whose weight gradient is that of the selected slice, and, while probing, its row scores."""

    @staticmethod
    def forward(ctx, x, x_slice, weight, weight_step, rows, index, scale, probe, probe_key, columns):
        ctx.columns, ctx.probe_width = columns, probe.shape[1:] if probe is not None else None
        ctx.rows_dtype, ctx.x_is_sliced = rows.dtype, x_slice is not None
        kept_rows = None if weight_step is None else rows
        ctx.save_for_backward(
            x_slice if ctx.x_is_sliced else x, weight, weight_step, kept_rows, index, scale, probe_key
        )
        if weight_step is not None:
            weight = whole(weight, weight_step, rows, index, int(columns), x.dtype)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad_y):
        saved, weight, weight_step, rows, index, scale, probe_key = ctx.saved_tensors
        if weight_step is not None:
            weight = whole(weight, weight_step, rows, index, int(ctx.columns), grad_y.dtype)
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
    """What a backward adds to the probe, from the (tokens, m) and (tokens, n) factors of the gradient G (m, n).

    No width: the squared norms of the rows of G (m,), by forming G. Width k: the sketch GΩ (m, k), Ω of random signs
    (n, k), at k (1/m + 1/n) of the cost and linear in G, so that it can be summed over batches and processes.
    """
    if not width:
        wide = torch.promote_types(other.dtype, torch.float32)
        return torch.linalg.vector_norm(selected.T @ other, dim=1, dtype=wide).square().float()
    omega = random_signs(key, other.shape[1], width[0], like=other)
    return _product(selected.T, other @ omega, torch.float32)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``; on a GPU bfloat16 factors give float32 as it was summed, with no rounding on the way."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


class SharedSlice:
    """One slice ``x[..., index]`` for the linears that read the same ``x`` and select the same columns of it.

    The first of its ``members`` to be called makes the slice and the last lets it go: only their graphs hold it then.
    """

    def __init__(self, members: int):
        self.members, self.left = members, 0
        self.x: Tensor | None = None
        self.slice: Tensor | None = None

    def of(self, x: Tensor, index: Tensor) -> Tensor:
        """The (…, rank) slice of ``x`` (…, in), made anew for an ``x`` that is not that of the call before."""
        if self.x is not x or self.slice is None:
            self.x, self.slice, self.left = x, x.detach().index_select(-1, index), self.members
        found = self.slice
        self.left -= 1
        if self.left == 0:
            self.x = self.slice = None
        return found


class GrassLinear(nn.Module):
    """A bias-free linear layer that trains ``rank`` of its rows (output features) or columns (input features).

    weight  Parameter (out, in), frozen: what the forward uses; with ``int8`` codes of what is not selected
    rows    Parameter (rank, in) for rows, (out, rank) for columns: the trainable copy of the selected slice
    index   buffer (rank,) int64: which rows or columns, in ascending order; entries may repeat
    scale   buffer (rank,) float32: ρ of each; used where ``scaled`` is set, which weighted samples need
    weight_step  with ``int8`` a buffer of the selected dimension, float32: see models.int8_weight

    Args:
        weight: the (out, in) weight; shared, not copied, and frozen.
        rank: how many rows or columns are trained, 1 ≤ rank ≤ the selected dimension.
        side: "rows", "columns" or "auto" (rows where out ≤ in: the smaller side, as in the paper).
        state_dtype: dtype of ``rows`` and so of its gradient and moments; the weight's own when None.
        int8: keep the weight in 8 bits, rounded to nearest; a forward and a backward make it whole for themselves.

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
        rank: int,
        side: str = "auto",
        state_dtype: torch.dtype | None = None,
        int8: bool = False,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if side not in ("auto", "rows", "columns"):
            raise ValueError(f"optim.side={side!r} is unknown; use auto, rows or columns")
        self.side = side if side != "auto" else "rows" if self.out_features <= self.in_features else "columns"
        self.dim = 0 if self.side == "rows" else 1
        if type(rank) is not int or not 1 <= rank <= weight.shape[self.dim]:
            raise ValueError(
                f"optim.rank={rank} must be between 1 and {weight.shape[self.dim]}, "
                f"the number of {self.side} of a {tuple(weight.shape)} weight"
            )
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
        self.shared: SharedSlice | None = None  # with the layers whose index is always this one's
        self.probe: Tensor | None = None  # a leaf outside parameters(): DDP, FSDP and the optimizer never see it
        self.probe_key: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out) in the weight's dtype."""
        scale = self.scale if self.scaled else None
        return _SelectedLinear.apply(
            x, self._slice_of(x), self.weight, self.weight_step, self.rows, self.index, scale, self.probe,
            self.probe_key, self.dim == 1,
        )  # fmt: skip

    def _slice_of(self, x: Tensor) -> Tensor | None:
        """What the backward needs of ``x`` where that is a slice: not while the whole gradient is being probed."""
        if self.dim == 0 or self.probe is not None or not torch.is_grad_enabled():
            return None
        return self.shared.of(x, self.index) if self.shared else x.detach().index_select(-1, self.index)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, side={self.side}"

    @property
    def rank(self) -> int:
        return self.index.numel()

    @property
    def selectable(self) -> int:
        """The size of the selected dimension: how many rows (or columns) there are to choose from."""
        return self.weight.shape[self.dim]

    @torch.no_grad()
    def reset(self) -> None:
        """Select the first rows and load them: what a layer that was built on the meta device needs."""
        self.index.copy_(torch.arange(self.rank, device=self.index.device))
        self.scale.fill_(1)
        rows = local(self.rows)
        rows.copy_(selected(self, self.index, rows.dtype))

    def positions(self) -> Tensor:
        """Where the elements of ``rows`` (of a sharded layer: those here) stand in the flattened weight, int64."""
        return positions(self, self.index)

    @torch.no_grad()
    def fold(
        self,
        before: Tensor | None = None,
        decay: float = 1.0,
        stepped: Tensor | None = None,
        rounding_key: int = 0,
    ) -> None:
        """Write a step on ``rows`` back: weight[index] = rows, rounded to the weight's dtype (not into one of 8 bits).

        A step made on a float32 copy of bfloat16 rows comes as ``stepped`` and is rounded stochastically by
        ``rounding_key``, so that no update is too small. float32 rows of a bfloat16 weight are master copies: they keep
        what the weight, rounded to nearest, cannot hold.

        With weighted rows (``scaled``) the step Δ of every draw counts ρ times and a row drawn twice takes both steps:
        w ← decay·w + Σ ρΔ, where ``before`` is ``rows`` as it was and ``decay`` what the step multiplied it by.
        """
        if self.scaled:
            assert before is not None
            stepped = self.stepped_draws(before, decay, self.rows if stepped is None else stepped)
        fold_rows([self], [stepped], [rounding_key])

    @torch.no_grad()
    def stepped_draws(self, before: Tensor, decay: float, after: Tensor) -> Tensor:
        """The new ``rows`` of a step on weighted ones, from what the optimizer made of each draw; see ``fold``."""
        before, after, scale = local(before), local(after), self.scale.unsqueeze(1 - self.dim)
        kept = before.to(torch.promote_types(before.dtype, torch.float32)) * decay
        steps = (after - kept) * scale
        first = torch.searchsorted(self.index, self.index)  # where each draw's row first stands in the sorted index
        summed = torch.zeros_like(steps).index_add_(self.dim, first, steps)
        return kept + summed.index_select(self.dim, first)

    def select(self, index: Tensor, scale: Tensor | None = None, rounding_key: int = 0) -> None:
        """Train the sorted ``index`` (rank,) from here on, with ρ = ``scale`` (rank,) or 1; see ``select_rows``."""
        for _ in select_rows([self], [index], [scale], [rounding_key]):
            pass

    def start_probe(self, key: Tensor | int, width: int | None) -> None:
        """From the next forward on, backward also adds to ``probe.grad`` what the scores need (see optim.selection).

        Args:
            key: names the random matrix of the sketch; a tensor is an int64 scalar on the weight's device.
            width: columns k of the sketch; None for exact squared norms.
        """
        shape = (self.selectable,) if width is None else (self.selectable, width)
        self.probe = torch.empty(shape, device=self.weight.device, requires_grad=True)  # only its gradient has a value
        self.probe_key = key if isinstance(key, Tensor) else torch.full((), key, device=self.weight.device)

    def stop_probe(self) -> Tensor:
        """End the probe and return what it gathered: (m,) squared norms or the (m, k) sketch, float32."""
        assert self.probe is not None
        gathered = self.probe.grad if self.probe.grad is not None else torch.zeros_like(self.probe)
        self.probe = self.probe_key = None
        return gathered.detach()
