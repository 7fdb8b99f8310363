"""Sharded tensors (torch's DTensor, as FSDP2 makes them): the local part, its place, sums over the parts.

An ordinary tensor counts as its own only part, so that every function here takes both.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` on this process: a view, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(tensor: Tensor) -> tuple[slice, ...]:
    """The place of the local part in the complete tensor: one slice per dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


@torch.no_grad()
def copy_local_part(tensor: Tensor, full: Tensor) -> None:
    """Copy into the local part of ``tensor`` its values in ``full`` (the complete tensor, on any device)."""
    local(tensor).copy_(full[place(tensor)])


def sum_parts(values: Tensor, tensor: Tensor) -> Tensor:
    """Sum ``values`` element by element over the processes that hold the parts of ``tensor``, in place."""
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(values, group=tensor.device_mesh.get_group(dim))
    return values
