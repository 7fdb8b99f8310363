"""Updates of many GrassLinear layers: write the rows back into the weights (the fold), and select other rows.

Layers of one shape are stacked, so that a GPU launches a few kernels for all of them instead of a few kernels per
layer: with hundreds of layers of small rows, launches cost more than arithmetic. Results are bit-identical to those
without stacking. "Rows" are columns in layers that select columns. ρ is the factor on the gradient of a selected row,
see optim.selection.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.dtensor import local, place
from models.int8_weight import dequantise, quantise
from models.stacking import stack_size
from models.stochastic_rounding import round_stochastically
from models.transfer import upload

if TYPE_CHECKING:
    from models.grass_linear import GrassLinear


class Change(NamedTuple):
    """The old and the new selection of several layers of equal shape.

    old_index, new_index  the selected rows or columns, (layers, rank) int64, ascending
    old_scale, new_scale  the factors ρ on their gradients, (layers, rank) float32; None if all are 1
    dim                   the selected dimension: 0 for rows, 1 for columns
    """

    old_index: Tensor
    new_index: Tensor
    old_scale: Tensor | None
    new_scale: Tensor | None
    dim: int

    def of(self, numbers: Sequence[int]) -> "Change":
        """The change of some of the layers, given by their positions in this change."""

        def part(stacked: Tensor | None) -> Tensor | None:
            return None if stacked is None else torch.stack([stacked[n] for n in numbers])

        return Change(
            torch.stack([self.old_index[n] for n in numbers]), torch.stack([self.new_index[n] for n in numbers]),
            part(self.old_scale), part(self.new_scale), self.dim,
        )  # fmt: skip


def group_alike(layers: Sequence["GrassLinear"]) -> Iterator[list[int]]:
    """Divide ``layers`` into groups with the same shapes, dtypes, device and selected dimension.

    Layers that are sharded over processes (DTensor) must also have the same part of the rows on this process. A group
    has at most as many layers as ``models.stacking.stack_size`` allows.

    Yields:
        A group, as a list of indices into ``layers``.
    """
    kinds: dict[object, list[int]] = {}
    for number, layer in enumerate(layers):
        rows, weight = layer.rows, layer.weight
        part = place(rows) if isinstance(rows, DTensor) else ()
        kind = (layer.dim, layer.scaled, rows.shape, rows.dtype, rows.device, weight.shape, weight.dtype, str(part))
        kinds.setdefault(kind, []).append(number)
    for numbers in kinds.values():
        first = layers[numbers[0]]
        size = stack_size(len(numbers), first.rows.numel(), first.index.device)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def positions(layer: "GrassLinear", index: Tensor) -> Tensor:
    """The position in the flattened weight of each element of the rows (or columns) ``index``.

    Args:
        layer: has the weight. If it is sharded, the result has only the elements of the local part.
        index: (…, rank) int64.

    Returns:
        int64, (…, rank, in) for rows, (…, out, rank) for columns.
    """
    part = place(layer.rows)[1 - layer.dim]
    other = torch.arange(part.start, part.stop, device=index.device)
    if layer.dim == 0:
        return index.unsqueeze(-1) * layer.in_features + other
    return other.unsqueeze(-1) * layer.in_features + index.unsqueeze(-2)


def positions_among(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """For each element of ``new`` (…, n): its first position in the sorted ``old`` (…, m), and whether it is there.

    Both results are (…, n), int64 and bool. The position of an element that is not in ``old`` is meaningless.
    """
    position = torch.searchsorted(old, new).clamp_max(old.shape[-1] - 1)
    return position, old.gather(-1, position) == new


@torch.no_grad()
def fold_rows(layers: Sequence["GrassLinear"], stepped: Sequence[Tensor | None], keys: Sequence[int]) -> None:
    """Write the ``rows`` of each layer into its weight: weight[index] = rows, rounded to nearest.

    8-bit weights are not written here, but by ``select_rows``.

    Args:
        layers: of any shapes.
        stepped: for each layer, new values for its ``rows``, in their shape, and in their precision or a higher one.
            They are first copied into ``rows``, with stochastic rounding if that has dtype bfloat16. None if they are
            already there.
        keys: for each layer, the key of the random numbers of the stochastic rounding, see models.counter_rng.
    """
    given = [number for number, value in enumerate(stepped) if value is not None]
    for group in group_alike([layers[number] for number in given]):
        numbers = [given[i] for i in group]
        members, values = [layers[n] for n in numbers], [local(v) for n in numbers if (v := stepped[n]) is not None]
        _write_rows(members, _rounded(members, values, local(members[0].rows).dtype, [keys[n] for n in numbers]))
    write_weights(fold_groups(layers))


class FoldGroup(NamedTuple):
    """The selected dimension (0 or 1) of layers of one shape, and the rows, weight and index of each layer."""

    dim: int
    rows: list[Tensor]
    weights: list[Tensor]
    indices: list[Tensor]


def fold_groups(layers: Sequence["GrassLinear"]) -> list[FoldGroup]:
    """Prepare ``layers`` for ``write_weights``. Layers with 8-bit weights are left out."""
    written = [layer for layer in layers if layer.weight_step is None]
    groups = [[written[number] for number in numbers] for numbers in group_alike(written)]
    return [FoldGroup(g[0].dim, [m.rows for m in g], [m.weight for m in g], [m.index for m in g]) for g in groups]


@torch.no_grad()
def write_weights(groups: Sequence[FoldGroup]) -> None:
    """Write the rows of every layer in ``groups`` into its weight: weight[index] = rows, rounded to nearest."""
    for dim, rows, weights, indices in groups:
        values, dtype = [local(r) for r in rows], weights[0].dtype
        if values[0].dtype != dtype:
            narrow = list(values[0].new_empty(len(values), *values[0].shape, dtype=dtype).unbind())
            torch._foreach_copy_(narrow, values)
            values = narrow
        for weight, index, value in zip(weights, indices, values, strict=True):
            local(weight).index_copy_(dim, index, value)


@torch.no_grad()
def round_values(
    layers: Sequence["GrassLinear"], values: Sequence[Tensor], dtype: torch.dtype, keys: Sequence[int]
) -> list[Tensor]:
    """Copies of ``values`` in ``dtype``, with stochastic rounding if that is bfloat16.

    Args:
        layers: of any shapes; their current selections determine the random numbers of each element.
        values: for each layer, a tensor in the shape of its ``rows``.
        keys: for each layer, the key of the random numbers, see models.counter_rng.
    """
    rounded = [torch.empty_like(value, dtype=dtype) for value in values]
    for numbers in group_alike(layers):
        members, wide = [layers[n] for n in numbers], [local(values[n]) for n in numbers]
        found = _rounded(members, wide, dtype, [keys[n] for n in numbers])
        torch._foreach_copy_([local(rounded[n]) for n in numbers], list(found))
    return rounded


def _write_rows(layers: Sequence["GrassLinear"], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_([local(layer.rows) for layer in layers], list(values))


def _rounded(
    layers: Sequence["GrassLinear"], values: Sequence[Tensor], dtype: torch.dtype, keys: Sequence[int]
) -> Sequence[Tensor]:
    """``values`` for the current rows of layers of one shape, in ``dtype``, rounded stochastically."""
    if dtype != torch.bfloat16 or values[0].dtype == dtype:
        return [value.to(dtype) for value in values]
    index = torch.stack([layer.index for layer in layers])
    rounded = round_stochastically(
        torch.stack(list(values)), dtype, _keys_of(layers, keys), positions(layers[0], index)
    )
    return rounded.unbind()


def _keys_of(layers: Sequence["GrassLinear"], keys: Sequence[int]) -> Tensor:
    """(layers, 1, 1) int64, on the device of the layers."""
    return upload(torch.tensor(keys, dtype=torch.int64), layers[0].index.device).view(-1, 1, 1)


@torch.no_grad()
def select_rows(
    layers: Sequence["GrassLinear"], index: Sequence[Tensor], scale: Sequence[Tensor | None], keys: Sequence[int]
) -> Iterator[tuple[list[int], Change]]:
    """Select other rows, and load their values from the weights. Layers change as the iterator is consumed.

    Rows with a higher precision than the weight are rounded stochastically into the weight when they leave the
    selection. Rows that stay keep their precision.

    Args:
        layers: of any shapes.
        index: for each layer, the new selection (rank,) int64, ascending.
        scale: for each layer, the factors ρ on the gradients of its rows, (rank,) float32; None if all are 1.
        keys: for each layer, the key of the random numbers of the stochastic rounding, see models.counter_rng.

    Yields:
        A group of layers of one shape, as indices into ``layers``, and their change.
    """
    for numbers in group_alike(layers):
        members = [layers[n] for n in numbers]
        device = members[0].index.device
        old_index = torch.stack([layer.index for layer in members])
        new_index = torch.stack([upload(index[n], device) for n in numbers])
        old_scale = new_scale = None
        if members[0].scaled or any(scale[n] is not None for n in numbers):
            old_scale = torch.stack([layer.scale for layer in members])
            ones = torch.ones_like(old_scale[0])
            new_scale = torch.stack([ones if (s := scale[n]) is None else upload(s, device) for n in numbers])
        change = Change(old_index, new_index, old_scale, new_scale, members[0].dim)
        _change(members, change, [keys[n] for n in numbers])
        yield numbers, change


def _change(layers: list["GrassLinear"], change: Change, keys: Sequence[int]) -> None:
    first, dim = layers[0], change.dim
    masters = torch.stack([local(layer.rows) for layer in layers])
    if first.weight_step is not None:
        codes, steps = quantise(masters, dim, _keys_of(layers, keys), positions(first, change.old_index))
        for layer, code, step in zip(layers, codes, steps, strict=True):
            assert layer.weight_step is not None
            layer.weight.index_copy_(dim, layer.index, code)
            layer.weight_step.index_copy_(0, layer.index, step)
    elif masters.dtype != first.weight.dtype:
        rounded = _rounded(layers, masters.unbind(), first.weight.dtype, keys)
        for layer, value in zip(layers, rounded, strict=True):
            local(layer.weight).index_copy_(dim, layer.index, value)
    torch._foreach_copy_([layer.index for layer in layers], list(change.new_index.unbind()))
    if change.new_scale is not None:
        torch._foreach_copy_([layer.scale for layer in layers], list(change.new_scale.unbind()))
    position, stays = (t.unsqueeze(2 - dim) for t in positions_among(change.old_index, change.new_index))
    loaded = torch.stack([selected(layer, layer.index, layer.rows.dtype) for layer in layers])
    kept = masters.take_along_dim(position, 1 + dim)
    _write_rows(layers, torch.where(stays, kept, loaded).unbind())
    if masters.dtype != first.weight.dtype and first.weight_step is None:
        # Rows that stay were rounded stochastically above too, but must be nearest.
        write_weights(fold_groups(layers))


def selected(layer: "GrassLinear", index: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in ``dtype`` of the rows (or columns) ``index`` (rank,) of the layer's weight.

    For a sharded layer, it has only the local part.
    """
    part = local(layer.weight.detach()).index_select(layer.dim, index)
    if layer.weight_step is None:
        return part.to(dtype)
    return dequantise(part, layer.weight_step[index], layer.dim, dtype)
