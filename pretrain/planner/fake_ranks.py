"""One process of many, without the others: what the planner walks through for a device of N.

Collectives go to torch's fake process group, which moves nothing. FSDP2 and HSDP are torch's own. DDP cannot be built
from tensors without data, so its buckets are made here as it makes them.
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
from pretrain.config.schema import DTYPES, TrainConfig
from pretrain.distributed.engines import Engine, build_engine
from pretrain.distributed.world import World


@contextmanager
def first_of(devices: int) -> Iterator[World]:
    """The world of the first of so many processes, alone if there is one."""
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


class Buckets(Engine):
    """DDP by what it holds and sends: gradients are views of buckets, which live as long as the run.

    Args:
        wire: what the buckets travel in.
    """

    def __init__(self, wire: torch.dtype | None):
        self.wire = wire

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
            p.register_post_accumulate_grad_hook(self._into_bucket)

    def backward(self, last: bool) -> AbstractContextManager:
        self.last = last
        return nullcontext()

    def finish_backward(self) -> None:
        for bucket in self.buckets:
            travels = bucket.to(self.wire or bucket.dtype)
            dist.all_reduce(travels)
            if travels is not bucket:
                bucket.copy_(travels)

    def _into_bucket(self, p: nn.Parameter) -> None:
        if self.last and p.grad is not None:
            p.grad = self.views[p].copy_(p.grad)


def walked_engine(train: TrainConfig, world: World) -> Engine:
    """The engine of a run, or what stands for it."""
    if world.size > 1 and train.parallel == "ddp":
        return Buckets(DTYPES[train.reduce_dtype] if train.reduce_dtype else None)
    with patch.object(dist.ProcessGroup, "set_timeout"):  # the fake group waits for nobody, and refuses it
        return build_engine(train, world)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that collectives sum, gather together or divide, each as a whole.

    In a ring a process sends (N − 1) / N of a tensor that is gathered or divided, and twice that of one that is summed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.bytes += max(sizes) if "_base_" in func.__name__ else sum(sizes)  # the whole, beside a part of it
        return func(*args, **(kwargs or {}))
