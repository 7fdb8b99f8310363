"""Where the numbers of a run go: metrics.jsonl always, W&B when it can, a progress bar on a terminal.

Only the main process writes.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pretrain.cli.console import _progress_bar
from pretrain.config.schema import Config
from pretrain.runs.folder import RunFolder
from pretrain.runs.wandb_log import WandbLogger

logger = logging.getLogger(__name__)


class JsonLinesFile:
    """Appends JSON lines to a file. What the disk does not take is said once, kept, and written when it can be."""

    def __init__(self, path: Path):
        self.path, self._pending, self._failing = path, b"", False

    def write(self, line: dict[str, Any]) -> None:
        self._pending += json.dumps(line).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:  # each time: the folder may have been away
                while self._pending:
                    self._pending = self._pending[file.write(self._pending) :]
        except OSError as error:
            if not self._failing:
                logger.warning("%s cannot be written (%s); the run goes on and keeps its lines", self.path, error)
            self._failing = True
        else:
            if self._failing:
                logger.warning("%s can be written again; no line is lost", self.path)
            self._failing = False


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
