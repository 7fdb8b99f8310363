"""Log a run for TensorBoard, with torch's own writer: ``logger.tensorboard=true``."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from pretrain.config.schema import LoggerConfig

logger = logging.getLogger(__name__)


class TensorboardLogger:
    """Writes the numbers in the lines of metrics.jsonl as scalars over the step.

    A failure, such as a full disk, ends only this log, with a warning: metrics.jsonl has every line.

    Args:
        folder: the folder of the event files; each start of the run writes a new file.
        first_step: number of steps that are already made. Of the files of earlier starts, TensorBoard then hides the
            values of later steps.
    """

    def __init__(self, folder: Path, first_step: int):
        self._writer: Any = None
        self._try(lambda: self._open(folder, first_step))

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, which has the key "step"; values that are not numbers are left out."""
        self._try(lambda: self._write(line))

    def close(self) -> None:
        """Close the event file."""
        self._try(lambda: self._writer and self._writer.close())
        self._writer = None

    def _open(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which is optional and takes a second

        # A run that starts again at step 0 also repeats the validation of step 0, so that value is hidden too.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def _write(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for name, value in line.items():
            if name != "step" and isinstance(value, Real):
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()  # a killed process loses no line

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever it raises must not end the training
            logger.warning("TensorBoard's log ends here: %s", error or type(error).__name__)
            self._writer = None


def tensorboard_problems(logger: LoggerConfig) -> list[str]:
    """Why the run cannot be logged for TensorBoard, with the fix; [] if it can or need not be."""
    if not logger.tensorboard or find_spec("tensorboard"):
        return []
    fix = "run .venv/bin/pip install -r requirements-extra.txt, or set it to false"
    return [f"logger.tensorboard=true needs the package tensorboard, which is not installed; {fix}"]
