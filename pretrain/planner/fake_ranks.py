"""Simulate rank 0 of several ranks without the other ranks.

Collectives use torch's fake process group, which moves no data. FSDP2 and HSDP are torch's own. DDP cannot be built
from tensors without data, so ``SimulatedDDP`` allocates the same buckets as DDP.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.llama import Llama
from models.precision import DTYPES
from pretrain.config.schema import TrainConfig
from pretrain.distributed.engines import Engine, build_engine
from pretrain.distributed.world import World


@contextmanager
def fake_world(devices: int) -> Iterator[World]:
    """A context with the ``World`` of rank 0 among ``devices`` ranks; with one device, there is no process group."""
    world = World(0, devices, torch.device("cpu"))
    if devices == 1:
        yield world
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        yield world
    finally:
        dist.destroy_process_group()


class SimulatedDDP(Engine):
    """The memory and the traffic of DDP: gradients are views of buckets that exist for the complete run.

    Args:
        wire_dtype: the dtype in which buckets are summed; None for the dtype of the gradients.
    """

    def __init__(self, wire_dtype: torch.dtype | None):
        self.wire_dtype = wire_dtype

    def wrap(self, model: Llama) -> None:
        super().wrap(model)
        self.last = True
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.buckets, self.views = [], dict[nn.Parameter, Tensor]()
        for dtype in dict.fromkeys(p.dtype for p in trainable):
            held = [p for p in trainable if p.dtype == dtype]
            self.buckets.append(torch.zeros(sum(p.numel() for p in held), dtype=dtype))
            parts = self.buckets[-1].split([p.numel() for p in held])
            self.views |= {p: part.view_as(p) for p, part in zip(held, parts, strict=True)}
        for p in trainable:
            p.register_post_accumulate_grad_hook(self._copy_to_bucket)

    def backward(self, last: bool) -> AbstractContextManager:
        self.last = last
        return nullcontext()

    def finish_backward(self) -> None:
        for bucket in self.buckets:
            sent = bucket.to(self.wire_dtype or bucket.dtype)
            dist.all_reduce(sent)
            if sent is not bucket:
                bucket.copy_(sent)

    def _copy_to_bucket(self, p: nn.Parameter) -> None:
        if self.last and p.grad is not None:
            p.grad = self.views[p].copy_(p.grad)


def simulated_engine(train: TrainConfig, world: World) -> Engine:
    """The engine of a run with the settings ``train``, but SimulatedDDP instead of DDP."""
    if world.size > 1 and train.parallel == "ddp":
        return SimulatedDDP(DTYPES[train.reduce_dtype] if train.reduce_dtype else None)
    with patch.object(dist.ProcessGroup, "set_timeout"):  # the fake group has no timeout and raises
        return build_engine(train, world)


class TrafficCounter(TorchDispatchMode):
    """While entered, add up in ``bytes`` the sizes of the tensors in collectives.

    For all_gather and reduce_scatter, the complete tensor counts.
    In a ring of N ranks, each rank sends (N − 1) / N of a gathered or scattered tensor, and twice this share of an
    all-reduced tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            # The arguments of "_base_" collectives are the complete tensor and a rank's share of it.
            self.bytes += max(sizes) if "_base_" in func.__name__ else sum(sizes)
        return func(*args, **(kwargs or {}))
