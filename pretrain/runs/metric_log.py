"""Log the metrics of a run to metrics.jsonl, W&B, TensorBoard and the terminal, on the main process only."""

import logging
from collections.abc import Mapping
from typing import Any

from pretrain.cli.console import as_text, run_bar
from pretrain.config.schema import Config
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import JsonLinesFile
from pretrain.runs.tensorboard_log import TensorboardLogger
from pretrain.runs.wandb_log import WandbLogger

logger = logging.getLogger(__name__)


class MetricLog:
    """Writes metrics to metrics.jsonl, selection.jsonl, W&B and TensorBoard, and shows them on the terminal.

    Args:
        first_step: number of steps that are already made; 0 for a new run.
        sizes: numbers of parameters and bytes by name, for W&B.
    """

    def __init__(self, folder: RunFolder, config: Config, first_step: int, sizes: Mapping[str, Any]):
        self._lines, self._selection = JsonLinesFile(folder.metrics_file), JsonLinesFile(folder.selection_file)
        self._wandb = WandbLogger(config, folder.path, sizes, folder.log_start)
        self._tensorboard = TensorboardLogger(folder.tensorboard, first_step) if config.logger.tensorboard else None
        self._bar = run_bar(config.train.steps, first_step)

    def write(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        """Write the metrics ``values`` by name. ``tokens`` is the number of tokens in the first ``step`` steps."""
        line = {"step": step, "tokens": tokens, **values}
        self._lines.write(line)
        self._wandb.log(line)
        if self._tensorboard:
            self._tensorboard.log(line)

    def write_selection(self, step: int, layers: dict[str, Any]) -> None:
        """Write a line of selection.jsonl: ``layers`` from ``SelectionHistory.by_layer``, unless it is empty."""
        if layers:
            self._selection.write({"step": step, "layers": layers})

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step``."""
        if self._bar:
            self._bar.advance(step)

    def show_step(self, step: int, values: dict[str, float]) -> None:
        """Log ``values`` of a training step as a line; on a terminal, show them beside the progress bar instead."""
        if self._bar:
            self._bar.show(values)
        logger.info("step %d · %s", step, as_text(values), extra={"in_bar": True})

    def show_validation(self, step: int, values: dict[str, float]) -> None:
        """Log ``values`` of a validation as a line, which stays on the terminal."""
        logger.info("step %d · %s", step, as_text(values))

    def show_results(self, samples: list[tuple[str, str]]) -> None:
        """Show the results of a finished run on W&B, see ``WandbLogger.log_results``."""
        self._wandb.log_results(samples)

    def stop_bar(self) -> None:
        """Remove the progress bar from the terminal, if there is one."""
        if self._bar:
            self._bar.stop()

    def close(self, summary: dict[str, Any]) -> None:
        """End the log. ``summary`` has the values for the run's summary on W&B."""
        self.stop_bar()
        if self._tensorboard:
            self._tensorboard.close()
        self._wandb.finish(summary)
