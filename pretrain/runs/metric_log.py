"""Where the numbers of a run go: metrics.jsonl always, W&B when it can, a progress bar on a terminal.

Only the main process writes.
"""

import logging
from typing import Any

from pretrain.cli.console import _progress_bar
from pretrain.config.schema import Config
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import JsonLinesFile
from pretrain.runs.wandb_log import WandbLogger

logger = logging.getLogger(__name__)


class MetricLog:
    """Writes a run's metric lines to ``metrics.jsonl`` and to W&B, and shows them to whoever watches."""

    def __init__(self, folder: RunFolder, config: Config, first_step: int):
        self._lines, self._selection = JsonLinesFile(folder.metrics_file), JsonLinesFile(folder.selection_file)
        self._bad_batches = JsonLinesFile(folder.bad_batches_file)
        self._wandb = WandbLogger(config, folder.path)
        self._bar = _progress_bar(config.train.steps, first_step)

    def write(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        line = {"step": step, "tokens": tokens, **values}
        self._lines.write(line)
        self._wandb.log(line)

    def write_selection(self, step: int, layers: dict[str, Any]) -> None:
        """A line of ``selection.jsonl``: what the refreshes since the last one chose, by layer."""
        if layers:
            self._selection.write({"step": step, "layers": layers})

    def write_bad_batch(self, line: dict[str, Any]) -> None:
        self._bad_batches.write(line)

    def advance(self, step: int, shown: dict[str, float]) -> None:
        """Move the bar to ``step``, or, without a terminal, say ``shown`` in a plain line."""
        text = " · ".join(f"{name} {value:,.{0 if value >= 1000 else 3}f}" for name, value in shown.items())
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, shown=text)
        if text:
            logger.info("step %d · %s", step, text, extra={"in_bar": True})

    def show_results(self, samples: list[tuple[str, str]]) -> None:
        """Show what a finished run came to, where tables and pictures can be shown."""
        self._wandb.log_results(samples)

    def close(self, summary: dict[str, Any]) -> None:
        if self._bar:
            self._bar.stop()
        self._wandb.finish(summary)
