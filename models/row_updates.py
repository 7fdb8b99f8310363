"""What changes the rows of many GrassLinear layers at once: the fold after a step, and a change of selection.

Layers of one shape are stacked and worked on together. On a GPU that is a few kernels for all of them, where each layer
by itself would launch as many: hundreds of layers of small rows are bound by launches, not by arithmetic. What is
computed for a layer is the same to the bit as by itself.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.dtensor import local, place
from models.int8_weight import dequantise, quantise
from models.precision import round_stochastically
from models.together import stack_size
from models.transfer import upload

if TYPE_CHECKING:
    from models.grass_linear import GrassLinear


class Change(NamedTuple):
    """A change of the rows of layers of one shape: index (layers, rank) and ρ (layers, rank) before and after.

    Sorted by index; ρ is None where it is 1; ``dim`` is the selected dimension.
    """

    old_index: Tensor
    new_index: Tensor
    old_scale: Tensor | None
    new_scale: Tensor | None
    dim: int

    def of(self, numbers: Sequence[int]) -> "Change":
        """That of some of the layers."""

        def some(stacked: Tensor | None) -> Tensor | None:
            return None if stacked is None else torch.stack([stacked[n] for n in numbers])

        return Change(
            torch.stack([self.old_index[n] for n in numbers]), torch.stack([self.new_index[n] for n in numbers]),
            some(self.old_scale), some(self.new_scale), self.dim,
        )  # fmt: skip


def alike(layers: Sequence["GrassLinear"]) -> Iterator[list[int]]:
    """The numbers of ``layers`` in groups that are stacked: alike in all but values, as many as go together."""
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
    """Where the elements of rows at ``index`` (…, rank) stand in the flattened weight of ``layer``, int64.

    (…, rank, in) for rows, (…, out, rank) for columns; of a sharded layer those of the part that is here.
    """
    here = place(layer.rows)[1 - layer.dim]
    other = torch.arange(here.start, here.stop, device=index.device)
    if layer.dim == 0:
        return index.unsqueeze(-1) * layer.in_features + other
    return other.unsqueeze(-1) * layer.in_features + index.unsqueeze(-2)


def positions_among(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``new`` (…, n) where it first stands in the sorted ``old`` (…, m), and whether it does.

    Where it does not, the place is void.
    """
    position = torch.searchsorted(old, new).clamp_max(old.shape[-1] - 1)
    return position, old.gather(-1, position) == new


@torch.no_grad()
def fold_rows(layers: Sequence["GrassLinear"], stepped: Sequence[Tensor | None], keys: Sequence[int]) -> None:
    """Write ``rows`` back to the weights: weight[index] = rows, rounded to nearest (not into a weight of 8 bits).

    Args:
        stepped: new values of the rows of each layer, in at least their precision, where they are not in ``rows``
            already; they are rounded into ``rows`` stochastically, so that no update is too small.
        keys: of each layer's rounding.
    """
    given = [number for number, value in enumerate(stepped) if value is not None]
    for group in alike([layers[number] for number in given]):
        numbers = [given[i] for i in group]
        members, values = [layers[n] for n in numbers], [local(v) for n in numbers if (v := stepped[n]) is not None]
        _write_rows(members, _rounded(members, values, local(members[0].rows).dtype, [keys[n] for n in numbers]))
    _write_weights([layer for layer in layers if layer.weight_step is None])


@torch.no_grad()
def round_values(
    layers: Sequence["GrassLinear"], values: Sequence[Tensor], dtype: torch.dtype, keys: Sequence[int]
) -> list[Tensor]:
    """``values`` of the shapes of the layers' rows as ``dtype``, rounded stochastically by ``keys``."""
    rounded = [torch.empty_like(value, dtype=dtype) for value in values]
    for numbers in alike(layers):
        members, wide = [layers[n] for n in numbers], [local(values[n]) for n in numbers]
        found = _rounded(members, wide, dtype, [keys[n] for n in numbers])
        torch._foreach_copy_([local(rounded[n]) for n in numbers], list(found))
    return rounded


def _write_rows(layers: Sequence["GrassLinear"], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_([local(layer.rows) for layer in layers], list(values))


def _write_weights(layers: Sequence["GrassLinear"]) -> None:
    """weight[index] = rows, rounded to nearest."""
    for group in alike(layers):
        members = [layers[number] for number in group]
        values, dtype = [local(layer.rows) for layer in members], members[0].weight.dtype
        if values[0].dtype != dtype:
            narrow = [torch.empty_like(value, dtype=dtype) for value in values]
            torch._foreach_copy_(narrow, values)
            values = narrow
        for layer, value in zip(members, values, strict=True):
            local(layer.weight).index_copy_(layer.dim, layer.index, value)


def _rounded(
    layers: Sequence["GrassLinear"], values: Sequence[Tensor], dtype: torch.dtype, keys: Sequence[int]
) -> Sequence[Tensor]:
    """``values`` of the present rows of layers that are alike, as ``dtype``, rounded stochastically."""
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
    """Train the sorted ``index`` (rank,) of each layer from here on, with ρ = ``scale`` (rank,) or 1; loads ``rows``.

    What the weight cannot hold of rows that leave is rounded stochastically, by ``keys``; rows that stay keep it.
    Layers change as the iterator is consumed.

    Yields:
        The numbers of some layers that are alike, and their change, when it is made.
    """
    for numbers in alike(layers):
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
        _write_weights(layers)  # rows that stay are master copies: what left them rounded is not what they hold


def selected(layer: "GrassLinear", index: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the slice of the weight at ``index``, of a sharded layer the part that is here."""
    part = local(layer.weight.detach()).index_select(layer.dim, index)
    if layer.weight_step is None:
        return part.to(dtype)
    return dequantise(part, layer.weight_step[index], layer.dim, dtype)
