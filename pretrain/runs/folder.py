"""The folder of a run, and the rules that prevent the loss of its files.

A run whose folder exists is resumed or refused. If a resumed run replaces something (metric lines after the checkpoint,
an older config.yaml), the old version is renamed and kept.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.atomic import UNFINISHED, write_atomic
from data.file_lock import LockHeld, file_lock
from pretrain.checkpoint.directory import Damaged, latest, read_state, remove_unfinished
from pretrain.config.compose import flat, read_config
from pretrain.config.schema import Config, ConfigError, marked

logger = logging.getLogger(__name__)

OUR_FILES = (
    "config*.yaml", "metrics*.jsonl", "selection*.jsonl", "bad_batches*.jsonl", "rollbacks.json", "summary.json",
)  # fmt: skip


class RunFolder:
    """The paths in the folder of a run (``run.root``/``run.name``), and the operations on its files.

    ``log_start`` is the number of bytes in the log file when ``open`` was called; 0 before.
    """

    def __init__(self, config: Config):
        self.path = Path(config.run.root) / config.run.name
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.selection_file = self.path / "selection.jsonl"
        self.bad_batches_file = self.path / "bad_batches.jsonl"
        self.rollbacks_file = self.path / "rollbacks.json"
        self.log_file, self.log_start = self.path / "train.log", 0
        self.checkpoints = self.path / "checkpoints"
        self.samples_file = self.path / "samples.md"
        self.summary_file = self.path / "summary.json"
        self.profile = self.path / "profile"
        self.tensorboard = self.path / "tensorboard"

    @property
    def latest_checkpoint(self) -> Path | None:
        return latest(self.checkpoints)

    def finished_step(self, steps: int) -> int | None:
        """The step of the newest checkpoint if the run is finished, otherwise None.

        A run is finished if it has a summary, and its newest checkpoint was saved after at least ``steps`` steps.

        Raises:
            ValueError: this checkpoint has a format that this version does not read.
        """
        newest = self.latest_checkpoint
        if newest is None or not self.summary_file.exists():
            return None
        try:
            step = read_state(newest)["step"]
        except Damaged:
            return None  # the run resumes from the previous checkpoint
        return step if step >= steps else None

    def log_finished(self, step: int) -> None:
        """Log that the run is finished at ``step``, and how to continue it."""
        logger.info("%s is finished at step %d; raise train.steps or choose a new run.name", self.path, step)

    def report_if_finished(self, config: Config) -> bool:
        """Whether the run of ``config`` is finished; if so, this is logged.

        Raises:
            ConfigError: the run is finished, but ``check`` refuses ``config``.
        """
        if (step := self.finished_step(config.train.steps)) is None:
            return False
        self.check(config)
        self.log_finished(step)
        return True

    def check(self, config: Config) -> list[str]:
        """The settings in which ``config`` differs from the existing run, one line each; [] without a checkpoint.

        Raises:
            ConfigError: the run exists and cannot be resumed with ``config``.
        """
        try:
            if not self.path.exists() or all(_no_part_of_a_run(p) for p in self.path.iterdir()):
                return []
        except FileNotFoundError:  # another process removed the folder that it had created, see require_writable
            return []
        if config.train.resume == "never":
            raise ConfigError(f"{self.path} exists; choose another run.name, or train.resume=auto to resume that run")
        if not self.config_file.exists():
            raise ConfigError(f"{self.path} exists, but is no run (it has no config.yaml); choose another run.name")
        if self.latest_checkpoint is None:
            return []
        changed = self.changes(config)
        may_change = marked(config, "may_change")
        refused = [k for k in changed if k not in may_change]
        if refused:
            lines = [f"{k} was {changed[k][0]}, is now {changed[k][1]}" for k in refused]
            raise ConfigError(
                f"{self.path} was trained with other settings; choose another run.name, or restore these:\n"
                + "\n".join(lines)
            )
        return [f"{k}: {was} → {now}" for k, (was, now) in changed.items()]

    def changes(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """The old and the new value of each setting in which ``config`` differs from the run in this folder."""
        old, new = flat(read_config(self.config_file)), flat(OmegaConf.structured(config))
        # Different keys come from another version of this program, and are not changes of settings.
        return {k: (old[k], new[k]) for k in sorted(old.keys() & new.keys()) if old[k] != new[k]}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context that keeps other runs out of the folder, which is created if necessary.

        Raises:
            ConfigError: another run uses the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with file_lock(self.path / ".lock"):
                yield
        except LockHeld as error:
            raise ConfigError(
                f"another run uses {self.path} ({error}); wait until it ends, or choose another run.name"
            ) from None

    def open(self, config: Config, step: int) -> None:
        """Prepare the folder for a run that starts or resumes after ``step``. Call on one process, after ``check``.

        Content that the run replaces is kept in files with unused names: the lines of later steps in its JSON lines
        files, the samples, the summary, and config.yaml if a setting changes.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path, *OUR_FILES)
        self.log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        before = self.config_file.read_text(encoding="utf-8") if self.config_file.exists() else text
        if before != text:
            write_atomic(_unused(self.path / "config.before.yaml"), before)
        write_atomic(self.config_file, text)
        self.checkpoints.mkdir(exist_ok=True)
        remove_unfinished(self.checkpoints, "step-*", "latest")
        for lines in (self.metrics_file, self.selection_file, self.bad_batches_file):
            self._set_lines_aside(lines, step, last_step=config.train.steps)
        for stale in (self.samples_file, self.summary_file):
            if stale.exists():
                stale.rename(_unused(stale.with_suffix(f".before{stale.suffix}")))

    def _set_lines_aside(self, file: Path, step: int, last_step: int) -> None:
        """Move the lines after ``step`` to another file, because they will be written again."""
        if not file.exists():
            return
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        # The validations of step 0 and of the last step follow the checkpoints of these steps, and are repeated.
        again = [step in (0, last_step) and _step_of(line) == step and '"val/loss"' in line for line in lines]
        kept = [_step_of(line) <= step and not repeated for line, repeated in zip(lines, again, strict=True)]
        if not all(kept):
            aside = _unused(file.with_stem(f"{file.stem}.after-step-{step}"))
            write_atomic(aside, "".join(line for line, keep in zip(lines, kept, strict=True) if not keep))
            write_atomic(file, "".join(compress(lines, kept)))


def _no_part_of_a_run(path: Path) -> bool:
    """Whether a file does not belong to a run: hidden files (also our lock), and half-written files."""
    return path.name.startswith(".") or path.name.endswith(UNFINISHED)


def _step_of(line: str) -> float:
    """The step of a metric line; infinity for an incomplete line after a crash."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def _unused(path: Path) -> Path:
    """``path``, or the first of path-2, path-3, … that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
