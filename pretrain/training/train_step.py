"""One update of the weights: forward and backward of the micro-batches, clipping, the optimizer's step.

What a run does again and again, and what the planner walks through without memory.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from optim.stack import OptimizerStack
from pretrain.config.schema import Config
from pretrain.distributed.engines import Engine
from pretrain.distributed.world import World

# Inputs and targets, int64 (micro_batch_size, seq_len) each; with train.document_masks also where documents begin.
MicroBatch = tuple[Tensor, ...]


class Update:
    """The update of one process.

    Args:
        model: whose parameters are trained.
        engine: runs the model's forwards and backwards on one process or several.
        optim: of ``pretrain.setup.optimizer.build_optimizer``.
        skip: make no update from a loss or gradient that is not finite, which needs to wait for the device each step.
    """

    def __init__(
        self, config: Config, world: World, model: nn.Module, engine: Engine, optim: OptimizerStack, skip: bool = False
    ):
        self.config, self.world, self.model, self.engine, self.optim = config, world, model, engine, optim
        self.skip, self.skipped = skip, False  # whether the latest update was
        self.trainable = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, micro_batches: Iterable[MicroBatch], count: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns this process' summed loss in nats and the global gradient norm, still on the device."""
        nats = self.accumulate(micro_batches, count, step=True)
        if self.optim.steps_in_backward:
            return nats, self.optim.grad_norm()
        grad_norm = self.engine.clip(self.trainable, self.config.optim.clip or float("inf"))
        self.skipped = self.skip and not self._finite(nats, grad_norm)
        if self.skipped:
            self.pass_over()
            return nats, grad_norm
        self.optim.step()
        return nats, grad_norm

    def pass_over(self) -> None:
        """Make no update, and count it where updates are counted."""
        self.optim.skip()

    def _finite(self, nats: Tensor, grad_norm: Tensor) -> bool:
        """Whether the loss of every process and the gradient are finite: the same answer on all of them."""
        return bool(self.world.sum(torch.stack([nats, grad_norm.to(nats)])).isfinite().all())

    def accumulate(self, micro_batches: Iterable[MicroBatch], count: int | None = None, step: bool = False) -> Tensor:
        """Forward and backward of every micro-batch; the gradient is that of the mean over all targets of the step.

        With ``step`` the last backward makes the optimizer's steps as well, if the run is one that does so.

        Args:
            count: of the step's targets on all processes, when not every token is one.
        """
        nats = torch.zeros((), device=self.world.device, dtype=torch.float64)
        # The engine averages over processes; the mean over tokens wants their sum.
        scale = self.world.size / (count or self.config.train.tokens_per_step)
        micro_batches = list(micro_batches)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with self.engine.backward(last), self.optim.backward(last) if step else nullcontext():
                loss = self.engine(*(self.world.upload(tensor) for tensor in batch))
                (loss * scale).backward()
            nats += loss.detach()
        self.engine.finish_backward()
        return nats
