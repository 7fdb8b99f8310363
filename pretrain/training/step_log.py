"""The logging of a run: lines of ``metrics.jsonl`` and ``selection.jsonl``, the progress bar, and the summary."""

import json
import logging
import math
import platform
from typing import Any

import torch

from data.atomic import write_atomic
from models.flops import flops_per_token, parameter_counts, peak_flops
from models.llama import Llama
from optim.memory import held_bytes
from optim.stack import OptimizerStack
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.runs.code_version import git_commit
from pretrain.runs.folder import RunFolder
from pretrain.runs.json_lines import read_json_lines
from pretrain.runs.metric_log import MetricLog
from pretrain.setup.compiling import compile_seconds
from pretrain.training.announcements import log_next_commands
from pretrain.training.divergence_warning import Divergence
from pretrain.training.samples import write_samples
from pretrain.training.throughput import Stopwatch, peak_bytes
from pretrain.training.train_step import StepResult

logger = logging.getLogger(__name__)
SHOWN = ("val/loss", "val/perplexity")  # metrics of a validation on the terminal


class StepLog:
    """Logs the steps of a run; only the main process writes.

    Args:
        watch: measures the time and tokens per second of steps.
        first_step: number of steps already done: 0 for a new run, else the step of the checkpoint.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        folder: RunFolder,
        model: Llama,
        optim: OptimizerStack,
        watch: Stopwatch,
        first_step: int,
    ):
        train = config.train
        self.config, self.world, self.folder, self.model, self.optim = config, world, folder, model, optim
        self.watch = watch
        self._flops_per_token = flops_per_token(model, train.seq_len)
        self._peak_flops = peak_flops(world.device, train.dtype, train.matmul_precision)
        self._compile_seconds = compile_seconds()  # logged so far; compile_blocks has logged these
        self._divergence = Divergence(config, read_json_lines(folder.metrics_file)) if world.is_main else None
        sizes = {**parameter_counts(model), "estimated_bytes": held_bytes(model, optim)}
        self._metrics = MetricLog(folder, config, first_step, sizes) if world.is_main else None
        self._commit = git_commit() if world.is_main else None  # now: the code on disk may change during the run

    def due(self, step: int) -> bool:
        """Whether ``step`` (from 1) is logged: multiples of ``train.log_every`` and the last step."""
        return step % self.config.train.log_every == 0 or step == self.config.train.steps

    def tokens(self, step: int) -> int:
        """The number of tokens in the first ``step`` steps, over all processes."""
        return step * self.config.train.tokens_per_step

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step``. Call after every step, logged or not."""
        if self._metrics:
            self._metrics.advance(step)

    def step(self, step: int, result: StepResult, data_s: float, skipped: int | None) -> None:
        """Log ``step`` (from 1).

        Args:
            result: the result of ``step``, already reduced unless no update was made.
            data_s: seconds per step of waiting for batches.
            skipped: number of steps without an update; None when this run cannot skip any.
        """
        made = not result.skipped and result.numbers
        tokens_per_s, step_s = self.watch.lap()
        rates = {f"train/lr_{name}": rate for name, rate in self.optim.rates().items()}
        values: dict[str, Any] = {
            "train/loss": made.loss if made else None, "train/grad_norm": made.grad_norm if made else None,
            "train/lr": rates["train/lr_linears"], **rates,
            "perf/tokens_per_s": tokens_per_s, "perf/step_s": step_s, "perf/data_s": data_s,
            "perf/tflops": tokens_per_s * self._flops_per_token / 1e12, "mem/peak_bytes": peak_bytes(self.world.device),
        }  # fmt: skip
        if self._peak_flops:
            values["perf/mfu"] = tokens_per_s * self._flops_per_token / (self._peak_flops * self.world.size)
        if self.optim.grass:
            values |= self.optim.grass.history.means()
        if skipped is not None:
            values |= {"train/skipped": skipped}
        self._log_compiling(step)
        self._write(step, values)
        if self._divergence and made:
            self._warn(self._divergence.train(step, made.loss))
        if self._metrics:
            self._metrics.show_step(step, {"loss": made.loss if made else math.nan, "tokens/s": tokens_per_s})
        if self.optim.grass and self._metrics:
            logged_before = (step - 1) // self.config.train.log_every * self.config.train.log_every
            self._metrics.write_selection(step, self.optim.grass.history.by_layer(since=logged_before))

    def layers(self, step: int, norms: dict[str, float | None]) -> None:
        """Log ``norms``, from ``LayerNorms.take`` after ``step``, unless it is empty."""
        if norms:
            self._write(step, norms)

    def validation(self, step: int, score: dict[str, float]) -> None:
        """Log the metrics of a validation after ``step`` steps, see ``Score.metrics``."""
        self._write(step, score)
        if self._metrics:
            self._metrics.show_validation(step, {name.replace("val/", "val "): score[name] for name in SHOWN})
        if self._divergence:
            self._warn(self._divergence.validation(step, score["val/loss"]))

    def summary(self, step: int, score: dict[str, float], samples: list[tuple[str, str]]) -> None:
        """Write ``summary.json`` and ``samples.md`` of the finished run, and close the log.

        Args:
            score: the metrics of the last validation.
            samples: from ``make_samples``; [] writes no samples.md.
        """
        if self._metrics is None:
            return
        seconds, tokens = self.watch.total_seconds, self.tokens(step)
        summary = {
            **score, **parameter_counts(self.model),
            "steps": step, "tokens": tokens, "tokens_per_s": tokens / seconds,
            "training_seconds": seconds, "wall_seconds": self.watch.wall_seconds, "compile_seconds": compile_seconds(),
            "peak_bytes": peak_bytes(self.world.device), "world_size": self.world.size,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "commit": self._commit,
            "divergence": self._divergence.found if self._divergence else None,
            "machine": platform.platform(),
        }  # fmt: skip
        if samples:
            write_samples(self.folder.samples_file, samples, f"{self.config.run.name} at step {step}")
        write_atomic(self.folder.summary_file, json.dumps(summary, indent=1) + "\n")
        self._metrics.show_results(samples)
        self.close(summary)
        diverged = ", but the run diverged, see the warning above" if summary["divergence"] else ""
        log_next_commands(self.config, self.folder.path)
        logger.info("finished: validation loss %.4f%s; see %s", score["val/loss"], diverged, self.folder.path)

    def stop_bar(self) -> None:
        """Remove the progress bar from the terminal, if there is one."""
        if self._metrics:
            self._metrics.stop_bar()

    def close(self, summary: dict[str, Any]) -> None:
        """End the log of this process. ``summary`` has the values for the run's summary on W&B."""
        if self._metrics:
            self._metrics.close(summary)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.write(step, self.tokens(step), values)

    def _warn(self, warning: str | None) -> None:
        if warning:
            logger.warning("%s", warning, extra={"alert": "The run diverges"})

    def _log_compiling(self, step: int) -> None:
        """Say how long compiling took, when it took more than a second since the last time."""
        if (seconds := compile_seconds()) - self._compile_seconds > 1:
            logger.info("step %d: compiling has taken %.0f s so far", step, seconds)
            self._compile_seconds = seconds
