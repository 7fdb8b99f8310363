"""Engines that train one model on several processes: torch's DDP and FSDP2, and HSDP (sharded replicas).

A Grass layer trains only ``rows``, a copy of the selected rows (or columns) of its weight, so few gradients are
communicated (FSDP2 still gathers all weights). FSDP2 shards the weight and its rows along the dimension that is not
selected. So every process writes the rows back to its own shard of the weight, and loads new rows from this shard,
without communication. Only choosing rows communicates: scores, and a hash of the chosen rows.
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

from models.dtensor import local, mean_over_processes, sum_parts
from models.grass_linear import GrassLinear
from models.llama import Llama
from models.precision import DTYPES
from optim.inner import INNER_OPTIMIZERS
from pretrain.config.schema import Config, TrainConfig
from pretrain.distributed.world import World, shards_of

DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
FORWARD_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"


class Engine:
    """Trains on a single process; the base class of the engines for several processes.

    Calling an engine calls the model. After ``finish_backward``, gradients are the mean over the processes.
    """

    sharded = False  # whether a forward needs all processes

    def shard(self, model: Llama) -> None:
        """Shard ``model`` in place, on the meta device, after its linear layers are converted to Grass."""

    def wrap(self, model: Llama) -> None:
        """Set the model to train, which is allocated. Call before a checkpoint is loaded and blocks are compiled."""
        self.module: nn.Module = model

    def __call__(self, input_ids: Tensor, targets: Tensor, *documents: Tensor) -> Tensor:
        """The loss of a micro-batch in nats, summed over targets, a scalar; the arguments are those of ``Llama``."""
        return self.module(input_ids, targets, *documents)

    def backward(self, last: bool) -> AbstractContextManager:
        """A context for the forward and backward of one micro-batch.

        Args:
            last: whether it is the last micro-batch of the step, whose backward communicates the gradients.
        """
        return nullcontext()

    def finish_backward(self) -> None:
        """Make the gradients means over the processes, if they are not yet; call after the last backward of a step."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients to the global norm ``limit``; returns the norm before clipping, a scalar on the device."""
        return nn.utils.clip_grad_norm_(parameters, limit)


class DDPEngine(Engine):
    """DDP: every process has the complete model. DDP's buckets contain only the gradients of trained parameters.

    Args:
        wire: the dtype in which gradients are sent and summed; None for the dtype of the gradients.
    """

    def __init__(self, wire: torch.dtype | None):
        self.wire = wire

    def wrap(self, model: Llama) -> None:
        # Nothing is broadcast: pretrain.setup.rank_agreement checks that the weights are the same everywhere.
        options: dict[str, Any] = {"init_sync": False, FORWARD_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        self.module = DistributedDataParallel(model, **options)
        if self.wire:
            self.module.register_comm_hook(self.wire, _mean_in)
        self._settle_buckets(model)

    def _settle_buckets(self, model: Llama) -> None:
        """Run a backward now. After its first backward, DDP rearranges its buckets by the order of the gradients.

        The layout of the buckets determines the order in which the gradients of the processes are summed. Without this
        call, the first step of a resumed run would sum in another order than the same step of an uninterrupted run.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.lm_head.weight.device)
        self.module(token, token).backward()
        model.zero_grad(set_to_none=True)

    def backward(self, last: bool) -> AbstractContextManager:
        assert isinstance(self.module, DistributedDataParallel)
        return nullcontext() if last else self.module.no_sync()


def _mean_in(wire: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DDP: the mean over the processes, sent and summed in ``wire``.

    Like torch's bf16_compress_hook, but for any dtype. DDP refuses bf16_compress_hook without NCCL, although gloo can
    sum bfloat16.
    """
    gradients = bucket.buffer()
    sent = gradients.to(wire) / dist.get_world_size()
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda summed: gradients.copy_(summed.value()[0]))


class FSDPEngine(Engine):
    """FSDP2 over ``mesh``, which has the dimensions (shard,), or (replica, shard) for HSDP.

    Parameters are gathered in these groups: each block, the embedding, and the head with all other parameters (and a
    tied embedding). Vectors (norms) are not sharded: they are too small, and in a bf16 run they are fp32, which FSDP2
    refuses in a group of bf16 parameters.

    Args:
        reduce_dtype: the dtype in which gradients are sent and summed; None for the dtype of the gradients.
        reshard: whether gathered weights are freed after the forward of their group; the head's are always kept,
            because its backward follows at once.
    """

    # Inner optimizers with state that is not per element, or whose step needs complete matrices.
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
                reshard_after_forward=self.reshard and group is not model,  # the head's backward comes at once
            )

    def wrap(self, model: Llama) -> None:
        self.module = model
        self.vectors = [p for p in model.parameters() if p.ndim < 2]

    def backward(self, last: bool) -> AbstractContextManager:
        self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def finish_backward(self) -> None:
        if gradients := [p.grad for p in self.vectors if p.grad is not None]:
            mean_over_processes(gradients)

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        sharded = [g for g in gradients if isinstance(g, DTensor)]
        replicated = [g for g in gradients if not isinstance(g, DTensor)]
        square = sum_parts(nn.utils.get_total_norm([local(g) for g in sharded]).square(), sharded[0])
        norm = (square + nn.utils.get_total_norm(replicated).square()).sqrt()
        torch._foreach_mul_([local(g) for g in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


def sharding_problems(config: Config, model: nn.Module, world_size: int) -> list[str]:
    """Why the converted ``model`` cannot be sharded as in ``config``: one message per problem, with the fix.

    [] with DDP or a single process, which need no shards.
    """
    train, optim = config.train, config.optim
    if train.parallel == "ddp" or world_size == 1:
        return []
    shards, problems = shards_of(train.parallel, train.shards, world_size), []
    if train.parallel == "hsdp" and (shards < 2 or world_size % shards):
        problems.append(
            f"train.shards={shards} must be at least 2 and divide the {world_size} processes; change it, or use "
            "train.parallel=fsdp or ddp"
        )
    for key, inner in (("inner", optim.inner), ("embedding_inner", optim.embedding_inner)):
        if any(inner in (name, INNER_OPTIMIZERS[name]) for name in FSDPEngine.REFUSED):
            problems.append(
                f"optim.{key}={inner} cannot step on shards; use muon, adamw, adam, sgd or normuon, or "
                "train.parallel=ddp"
            )
    if getattr(optim, "int8_weights", False):
        problems.append(
            "optim.int8_weights=true: each step size of 8-bit weights needs a complete row, but shards have parts of "
            "rows; set it to false, or use train.parallel=ddp"
        )
    for child, size in {
        name.rpartition(".")[2]: layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, GrassLinear) and layer.dim == 0 and layer.in_features % max(shards, 1)
    }.items():
        problems.append(
            f"{child} selects rows of {size} elements, which cannot be divided among {shards} shards; set "
            f"optim.side={{{child}: columns}}, another size, or train.parallel=ddp"
        )
    return problems


def build_engine(train: TrainConfig, world: World) -> Engine:
    """The engine for ``train.parallel``; a plain ``Engine`` for a single process."""
    if world.size == 1:
        return Engine()
    wire = DTYPES[train.reduce_dtype] if train.reduce_dtype else None
    if train.parallel == "ddp":
        return DDPEngine(wire)
    shards = shards_of(train.parallel, train.shards, world.size)
    shape, names = ((world.size // shards, shards), ("replica", "shard")) if shards < world.size else ((shards,), None)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names or ("shard",))
    for dim in range(mesh.ndim):  # torch gives groups of some of the processes its own timeout
        mesh.get_group(dim).set_timeout(timedelta(minutes=train.timeout_minutes))
    return FSDPEngine(mesh, wire, train.reshard)
