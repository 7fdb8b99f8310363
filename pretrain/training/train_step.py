"""One training step: forward and backward over micro-batches, clipping, and the optimizer's step."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.transfer import upload
from optim.stack import OptimizerStack
from pretrain.config.schema import Config
from pretrain.distributed.engines import Engine
from pretrain.distributed.world import World
from pretrain.training.step_observer import StepObserver, notify

# Inputs and targets, int64 (micro_batch_size, seq_len) each; with train.document_masks also the document starts.
MicroBatch = tuple[Tensor, ...]


@dataclass(frozen=True)
class StepNumbers:
    """Mean loss in nats per target and global gradient norm before clipping; the same on every process.

    ``finite`` is false if, on at least one process, these numbers or those of an earlier update are not finite.
    """

    loss: float
    grad_norm: float
    finite: bool


@dataclass
class StepResult:
    """Result of one step on this process. Its tensors are on the device until ``reduce``.

    Args:
        nats: loss summed over this process' targets, in nats, float64 ().
        grad_norm: global norm of the gradients before clipping, ().
        targets: number of targets on all processes.
        skipped: whether no update was made.
        numbers: the result of ``reduce``; None before.
    """

    nats: Tensor
    grad_norm: Tensor
    targets: int
    skipped: bool = False
    numbers: StepNumbers | None = None

    def finite(self) -> Tensor:
        """Whether loss and gradient norm are finite on this process, bool () on the device."""
        return self.nats.isfinite() & self.grad_norm.isfinite()

    def reduce(self, world: World, failed_before: Tensor | None = None) -> StepNumbers:
        """Compute the numbers of the step over all processes; call on every process. Waits for the device.

        The second and later calls return the same numbers and do not communicate.

        Args:
            failed_before: bool (), whether an earlier update of this process was not finite.
        """
        if self.numbers is None:
            failed = ~self.finite() if failed_before is None else ~self.finite() | failed_before
            summed = world.sum(torch.stack([self.nats, failed.to(self.nats)]))
            # One wait for the device, for all three numbers.
            nats, failures, norm = torch.cat([summed, self.grad_norm.to(self.nats).view(1)]).tolist()
            finite = not failures and math.isfinite(nats) and math.isfinite(norm)
            self.numbers = StepNumbers(nats / self.targets, norm, finite)
        return self.numbers


class TrainStep:
    """The training step of one process.

    Args:
        model: the model whose parameters are trained.
        engine: runs forwards and backwards of ``model`` on one process or several.
        optim: as returned by ``pretrain.setup.optimizer.build_optimizer``.
        skip: make no update if the loss or gradient is not finite. This check makes every step wait for the device.
        observers: are notified when the parts of a step begin and end.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        model: nn.Module,
        engine: Engine,
        optim: OptimizerStack,
        skip: bool = False,
        observers: Sequence[StepObserver] = (),
    ):
        self.config, self.world, self.model, self.engine, self.optim = config, world, model, engine, optim
        self.skip, self.observers = skip, tuple(observers)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if observers:
            self._observe_optimizer()

    def __call__(self, micro_batches: Iterable[MicroBatch], targets: int | None = None) -> StepResult:
        """Make one update, or none if ``skip`` is set and the loss or gradient is not finite.

        Args:
            targets: number of the step's targets on all processes; by default every token is a target.
        """
        targets = targets or self.config.train.tokens_per_step
        nats = self.accumulate(micro_batches, targets, step=True)
        if self.optim.steps_in_backward:
            return StepResult(nats, self.optim.grad_norm(), targets)
        result = StepResult(nats, self.engine.clip(self.trainable, self.config.optim.clip or float("inf")), targets)
        result.skipped = self.skip and not result.reduce(self.world).finite
        if result.skipped:
            self.optim.skip()
        else:
            self.optim.step()
        return result

    def leave_out(self) -> StepResult:
        """Make no update and read no batch; the step still counts towards the next refresh."""
        self.optim.skip()
        missing = torch.full((), math.nan, device=self.world.device)
        return StepResult(missing, missing, 0, skipped=True)

    def accumulate(self, micro_batches: Iterable[MicroBatch], targets: int | None = None, step: bool = False) -> Tensor:
        """Run forward and backward of every micro-batch. Gradients are those of the mean loss over all targets.

        Args:
            targets: number of the step's targets on all processes; by default every token is a target.
            step: let the last backward make the optimizer's steps, if ``train.step_in_backward`` is set.

        Returns:
            Loss summed over this process' targets, in nats, as a float64 scalar tensor on the device.
        """
        nats = torch.zeros((), device=self.world.device, dtype=torch.float64)
        # The engine averages over processes; the mean over tokens needs their sum.
        scale = self.world.size / (targets or self.config.train.tokens_per_step)
        micro_batches = list(micro_batches)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with self.engine.backward(last), self.optim.backward(last) if step else nullcontext():
                notify(self.observers, "before_forward")
                loss = self.engine(*(upload(tensor, self.world.device) for tensor in batch))
                notify(self.observers, "after_forward")
                notify(self.observers, "before_backward")
                (loss * scale).backward()
            nats += loss.detach()
        self.engine.finish_backward()
        notify(self.observers, "after_backward")
        return nats

    def _observe_optimizer(self) -> None:
        observers = self.observers  # the hooks must not reference this object, which references the optimizer
        self.optim.optimizer.register_step_pre_hook(lambda *_: notify(observers, "before_optimizer"))
        self.optim.optimizer.register_step_post_hook(lambda *_: notify(observers, "after_optimizer"))
        if grass := self.optim.grass:
            grass.register_refresh_pre_hook(lambda: notify(observers, "before_refresh"))
            grass.register_refresh_post_hook(lambda: notify(observers, "after_refresh"))
