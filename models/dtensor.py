"""Sharded tensors (torch's DTensor, as in FSDP2): the local part, its position, and sums over processes.

Functions of a sharded tensor also accept an ordinary tensor, which is treated as a tensor with a single part.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` on this process, as a view; for an ordinary tensor, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor) -> tuple[slice, ...]:
    """The position of this process's part in the complete ``tensor``: one slice per dimension, full if not sharded."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


@torch.no_grad()
def copy_local_part(tensor: Tensor, full: Tensor) -> None:
    """Fill this process's part of ``tensor`` from the complete tensor ``full``, which may have any device and dtype."""
    local(tensor).copy_(full[place(tensor)])


def sum_parts(values: Tensor, tensor: Tensor, dim: int | None = None) -> Tensor:
    """Sum ``values`` element by element over the processes that hold different parts of ``tensor``.

    Args:
        values: of the same shape on all processes; changed in place.
        tensor: determines the processes. If it is not sharded, ``values`` stay unchanged.
        dim: sum only over parts that divide this dimension of ``tensor``; None: over all parts.

    Returns:
        ``values``.
    """
    if isinstance(tensor, DTensor):
        for mesh_dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard) and dim in (None, placement.dim):
                dist.all_reduce(values, group=tensor.device_mesh.get_group(mesh_dim))
    return values


def mean_over_processes(tensors: list[Tensor], power: int = 1) -> None:
    """Sum ``tensors`` over all processes in place, and divide by (number of processes) ** ``power``.

    The tensors are not sharded. One collective serves all. Call it on every process, with tensors of the same sizes.

    Args:
        tensors: at least one; on one device.
        power: 1 for means. 2 for squared norms: if N processes have ‖G_p‖², the result is the sum of ‖G_p / N‖².
    """
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size() ** power
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


def zeros_divided_like(tensor: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros of ``size`` and ``dtype`` on the device of ``tensor``, sharded like ``tensor`` where the sizes are equal.

    Args:
        size: has as many entries as ``tensor`` has dimensions. A dimension in which the sizes differ is not sharded.

    Returns:
        A DTensor if any dimension is sharded, otherwise an ordinary tensor.
    """
    if isinstance(tensor, DTensor):
        placements = [
            p if isinstance(p, Shard) and size[p.dim] == tensor.shape[p.dim] else Replicate() for p in tensor.placements
        ]
        if not all(p.is_replicate() for p in placements):
            return zeros(*size, dtype=dtype, device_mesh=tensor.device_mesh, placements=placements)
    return torch.zeros(*size, dtype=dtype, device=tensor.device)
