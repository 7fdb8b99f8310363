"""One model on many processes, by torch's own engines: DDP, FSDP2, or HSDP (copies of the model, each of them sharded).

What they move is small because all they see of a Grass layer is its small ``rows``. FSDP2 shards a layer's weight and
rows on the dimension that is not selected: every process then folds and refreshes its own shard with the same index,
and says nothing to the others about it.
"""

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from models.dtensor import local, sum_parts
from models.grass_linear import GrassLinear
from models.llama import Llama
from models.precision import DTYPES
from optim.inner import INNER_OPTIMIZERS
from pretrain.config.schema import Config, TrainConfig
from pretrain.distributed.world import World, shards_of

DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
FORWARD_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"


class Engine:
    """One process alone; DDP and FSDP2 differ from it in what they override.

    Called, it is the model. Gradients are the mean over the processes once ``finish_backward`` has returned.
    """

    sharded = False  # whether a forward needs every process

    def shard(self, model: Llama) -> None:
        """Make ``model``, on the meta device and with its Grass layers, one that holds only this process' part."""

    def wrap(self, model: Llama) -> None:
        """Take ``model`` into use, before its weights are loaded from a checkpoint, and before it is compiled."""
        self.module: nn.Module = model

    def __call__(self, input_ids: Tensor, targets: Tensor, *documents: Tensor) -> Tensor:
        return self.module(input_ids, targets, *documents)

    def backward(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward of a micro-batch; gradients travel only with the ``last`` one of a step."""
        return nullcontext()

    def finish_backward(self) -> None:
        """After the last backward of a step."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients to the global norm ``limit``; returns the norm they had, on the device."""
        return nn.utils.clip_grad_norm_(parameters, limit)


class DDPEngine(Engine):
    """DDP: a copy of the model on every process; its buckets hold the gradients of what is trained, and no others.

    Args:
        wire: what the buckets travel, and are summed, in; as they are when None.
    """

    def __init__(self, wire: torch.dtype | None):
        self.wire = wire

    def wrap(self, model: Llama) -> None:
        # Nothing is broadcast: that the weights are the same everywhere is checked (pretrain.agreement).
        options: dict[str, Any] = {"init_sync": False, FORWARD_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        self.module = DistributedDataParallel(model, **options)
        if self.wire:
            self.module.register_comm_hook(self.wire, _travel_in)
        self._settle_buckets(model)

    def _settle_buckets(self, model: Llama) -> None:
        """Let DDP put its buckets into their final order now.

        It does that once, after the first backward, by the order in which gradients came; and the layout of the buckets
        decides the order in which the processes' parts are summed. A run that goes on would make its first step in
        another order than one that was never stopped.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.lm_head.weight.device)
        self.module(token, token).backward()
        model.zero_grad(set_to_none=True)

    def backward(self, last: bool) -> AbstractContextManager:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last else self.module.no_sync()


def _travel_in(wire: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A comm hook of DDP: the mean over the processes, summed in ``wire``.

    Torch's bf16_compress_hook, for any dtype: DDP refuses torch's own without NCCL, though gloo sums bfloat16 as well.
    """
    gradients = bucket.buffer()
    sent = gradients.to(wire) / dist.get_world_size()
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: gradients.copy_(summed.value()[0]))


class FSDPEngine(Engine):
    """FSDP2 over ``mesh``: (shard,), or (replica, shard) for HSDP.

    The groups that are gathered together are the blocks, the embedding, and the head with all that is left. Vectors
    (norms) stay whole on every process: they are too small to shard, and in a bf16 run they are fp32, which a group
    of bf16 gradients could not take.
    """

    # Their state does not belong to single elements, or their step needs whole matrices.
    REFUSED = ("adafactor", "adamw8bit", "galore", "apollo", "fira")

    sharded = True

    def __init__(self, mesh: DeviceMesh, reduce_dtype: torch.dtype | None, reshard: bool):
        self.mesh, self.reduce_dtype, self.reshard = mesh, reduce_dtype, reshard

    def shard(self, model: Llama) -> None:
        grass = [module for module in model.modules() if isinstance(module, GrassLinear)]
        unselected = {p: Shard(1 - layer.dim) for layer in grass for p in (layer.weight, layer.rows)}
        vectors = {p for p in model.parameters() if p.ndim < 2}
        for group in [*model.layers, *([] if model.tie_word_embeddings else [model.embed_tokens]), model]:
            fully_shard(
                group,
                mesh=self.mesh,
                shard_placement_fn=unselected.get,
                ignored_params=vectors,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype),
                reshard_after_forward=self.reshard and group is not model,  # the head is needed again at once
            )

    def wrap(self, model: Llama) -> None:
        self.module = model
        self.vectors = [p for p in model.parameters() if p.ndim < 2]

    def backward(self, last: bool) -> AbstractContextManager:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def finish_backward(self) -> None:
        gradients = [p.grad for p in self.vectors if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        sharded = [g for g in gradients if isinstance(g, DTensor)]
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        square = sum_parts(nn.utils.get_total_norm([local(g) for g in sharded]).square(), sharded[0])
        norm = (square + nn.utils.get_total_norm(whole).square()).sqrt()
        torch._foreach_mul_([local(g) for g in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


def sharding_problems(config: Config, model: nn.Module, world_size: int) -> list[str]:
    """Why ``model``, with its Grass layers, cannot be sharded as ``config`` asks; a message each, with the mend."""
    train, optim = config.train, config.optim
    if train.parallel == "ddp" or world_size == 1:
        return []
    shards, problems = shards_of(train.parallel, train.shards, world_size), []
    if train.parallel == "hsdp" and (shards < 2 or world_size % shards):
        problems.append(
            f"train.shards={shards} must be at least 2 and divide the {world_size} processes; change it, or use "
            "train.parallel=fsdp or ddp"
        )
    if any(optim.inner in (name, INNER_OPTIMIZERS[name]) for name in FSDPEngine.REFUSED):
        problems.append(
            f"optim.inner={optim.inner} cannot step on shards; use muon, adamw, adam or sgd, or train.parallel=ddp"
        )
    if getattr(optim, "int8_weights", False):
        problems.append(
            "optim.int8_weights=true: the steps of 8-bit weights belong to whole rows, which shards do not have; set "
            "it to false, or train.parallel=ddp"
        )
    for child, size in {
        name.rpartition(".")[2]: layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, GrassLinear) and layer.dim == 0 and layer.in_features % max(shards, 1)
    }.items():
        problems.append(
            f"{child} selects rows of {size} elements, which do not divide among {shards} shards; set "
            f"optim.side={{{child}: columns}}, another size, or train.parallel=ddp"
        )
    return problems


def build_engine(train: TrainConfig, world: World) -> Engine:
    """The engine that ``train.parallel`` names; a single process needs none."""
    if world.size == 1:
        return Engine()
    wire = DTYPES[train.reduce_dtype] if train.reduce_dtype else None
    if train.parallel == "ddp":
        return DDPEngine(wire)
    shards = shards_of(train.parallel, train.shards, world.size)
    shape, names = ((world.size // shards, shards), ("replica", "shard")) if shards < world.size else ((shards,), None)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names or ("shard",))
    for dim in range(mesh.ndim):  # groups of some of the processes begin with torch's own timeout
        mesh.get_group(dim).set_timeout(timedelta(minutes=train.timeout_minutes))
    return FSDPEngine(mesh, wire, train.reshard)
