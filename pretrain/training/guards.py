"""Judge steps: losses and gradients that are not finite, and loss spikes.

Batches without an update, and batches that ended the run, are listed in ``bad_batches.jsonl`` with their documents.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from enum import Enum
from statistics import median

import torch

from data.loading.batches import TrainBatches
from pretrain.config.schema import TrainConfig
from pretrain.distributed.world import World
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import JsonLinesFile
from pretrain.training.train_step import StepNumbers, StepResult

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 10  # if more steps fail, the cause is the weights and not single batches
WINDOW = 32  # number of earlier losses with whose median a loss is compared
NEEDED = 8  # minimum number of earlier losses; with fewer, nothing is a spike
NAMED = 5  # documents in a message; the file lists all documents

Verdict = Enum("Verdict", ["CONTINUE", "FAIL", "ROLL_BACK"])


class Guards:
    """Judges every step of a run, and keeps all counters of failed steps.

    ``skipped`` is the number of steps without an update, ``losses`` has the latest losses in nats per target (if
    ``train.spike_factor`` is set), and ``reason`` explains the verdict FAIL in a few lines. Checkpoints contain
    ``skipped`` and ``losses``, so a resumed run finds the same spikes.

    Args:
        batches: the training batches, for the names of documents.
        rollbacks: steps whose batches are skipped, see ``CheckpointManager``.
    """

    def __init__(
        self, train: TrainConfig, world: World, batches: TrainBatches, folder: RunFolder, rollbacks: Sequence[int]
    ):
        self.train, self.world, self.batches, self.rollbacks = train, world, batches, rollbacks
        self.skipped, self.reason = 0, ""
        self.losses = deque[float](maxlen=WINDOW)
        self._skipped_at = self._skipped_in_a_row = 0
        # The first step that was not finite, 0 for none. It is on the device, so that no step waits for it.
        self._first_failed = torch.zeros((), dtype=torch.int64, device=world.device)
        self._file = folder.bad_batches_file
        self._lines = JsonLinesFile(self._file) if world.is_main else None

    @property
    def skips(self) -> int | None:
        """``skipped`` for the log; None if ``train.non_finite`` is not "skip" and there was no rollback."""
        return self.skipped if self.train.non_finite == "skip" or self.rollbacks else None

    def leaves_out(self, step: int) -> bool:
        """Whether the batch of ``step`` (from 1) is skipped after a rollback."""
        return step in self.rollbacks

    def resume(self, skipped: int, losses: Iterable[float]) -> None:
        """Continue with ``skipped`` and ``losses`` of a checkpoint."""
        self.skipped = skipped
        self.losses.extend(losses)

    def judge(self, step: int, result: StepResult, reduce: bool) -> Verdict:
        """Judge the result of ``step`` (from 1). Call on every process, after every step.

        Args:
            reduce: compute the loss and the gradient norm now, which waits for the device. Otherwise non-finite values
                are noticed in a later call. With ``train.spike_factor``, every call computes them.

        Returns:
            The ``Verdict``: CONTINUE; FAIL if the run must end, see ``reason``; ROLL_BACK if the run must return to the
            newest checkpoint and skip the batch of ``step``.
        """
        if result.skipped:
            return self._skip(step)
        failed_now = (self._first_failed == 0) & ~result.finite()
        self._first_failed = torch.where(failed_now, step, self._first_failed)
        if not reduce and not self.train.spike_factor:
            return Verdict.CONTINUE
        numbers = result.reduce(self.world, self._first_failed > 0)
        if not numbers.finite:
            return self._fail(step, numbers)
        return self._look_for_spike(step, numbers.loss) if self.train.spike_factor else Verdict.CONTINUE

    def _skip(self, step: int) -> Verdict:
        what = "skipped: loss spike" if self.leaves_out(step) else "skipped: loss or gradient not finite"
        self.skipped += 1
        self._skipped_in_a_row = 1 if step != self._skipped_at + 1 else self._skipped_in_a_row + 1
        self._skipped_at = step
        documents = self._write_bad_batch(step, what)
        alert = {"alert": "Step skipped"}
        logger.warning("step %d is %s; its batch has %s", step, what, _in_short(documents), extra=alert)
        if self._skipped_in_a_row <= MOST_SKIPPED_IN_A_ROW:
            return Verdict.CONTINUE
        self.reason = (
            f"{self._skipped_in_a_row} steps in a row, up to step {step}, have a loss or gradient that is not finite; "
            f"lower optim.lr or optim.linear_lr\n{self._file} lists the documents of their batches"
        )
        return Verdict.FAIL

    def _fail(self, step: int, numbers: StepNumbers) -> Verdict:
        first = min(int(value) or step for value in self.world.gather_objects(int(self._first_failed)))
        documents = self._write_bad_batch(
            first, "stopped: loss or gradient not finite", loss=numbers.loss, grad_norm=numbers.grad_norm
        )
        since = f", not finite since step {first}" if first < step else ""
        self.reason = (
            f"the training loss is {numbers.loss} and the gradient's norm {numbers.grad_norm} at step {step}{since}; "
            f"lower optim.lr or optim.linear_lr, or set train.non_finite=skip\n"
            f"the batch of step {first} has {_in_short(documents)}; {self._file} lists all of its documents"
        )
        return Verdict.FAIL

    def _look_for_spike(self, step: int, loss: float) -> Verdict:
        spike = len(self.losses) >= NEEDED and loss > self.train.spike_factor * median(self.losses)
        if spike and len(self.rollbacks) < self.train.most_rollbacks:
            logger.warning(
                "the loss jumped to %.4f at step %d, whose batch has %s; going back to the newest checkpoint and "
                "continuing from there without this batch",
                *(loss, step, _in_short(self.batches.documents(step - 1))),
                extra={"alert": "Rolled back"},
            )
            return Verdict.ROLL_BACK
        if spike:
            logger.warning(
                "the loss jumped to %.4f at step %d; train.most_rollbacks=%d allows no further return to a checkpoint, "
                "so the run continues with this batch; if the loss stays high, lower optim.lr or optim.linear_lr",
                *(loss, step, self.train.most_rollbacks),
            )
        self.losses.append(loss)  # also after a spike, so that a permanently higher loss is soon not a spike any more
        return Verdict.CONTINUE

    def _write_bad_batch(self, step: int, what: str, **numbers: float) -> list[str]:
        """Add a line to ``bad_batches.jsonl``; returns the names of the documents in the batch of ``step``."""
        documents = self.batches.documents(step - 1)
        if self._lines:
            # JSON cannot represent non-finite numbers.
            values = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
            self._lines.write({"step": step, "what": what, **values, "documents": documents})
        return documents


def _in_short(documents: list[str]) -> str:
    more = len(documents) - NAMED
    return ", ".join(documents[:NAMED]) + (f" and {more} more" if more > 0 else "")
