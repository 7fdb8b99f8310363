"""Tensors of which every process holds a part (torch's DTensor, as FSDP2 makes them): the part, its place, its sums.

An ordinary tensor is its own only part, so that everything here works on both.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that is here: a view, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor) -> tuple[slice, ...]:
    """Where the part that is here stands in the full tensor: a slice for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


@torch.no_grad()
def fill_part(tensor: Tensor, full: Tensor) -> None:
    """Give ``tensor`` the values of ``full`` (of its full shape, on any device), each process its part."""
    local(tensor).copy_(full[place(tensor)])


def sum_parts(values: Tensor, tensor: Tensor) -> Tensor:
    """The element-wise sum of ``values`` over the processes that hold the parts of ``tensor``, in place."""
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(values, group=tensor.device_mesh.get_group(dim))
    return values
