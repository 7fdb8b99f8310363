"""The folder a run leaves behind, and the rules that keep what is in it from being lost.

A name that exists is resumed or refused. Whatever a resumed run no longer stands on (metric lines after the
checkpoint, an older config.yaml) is moved aside under a name of its own, never dropped.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from data.atomic import UNFINISHED, write_atomic
from pretrain.checkpoint.directory import Damaged, latest, read_state, remove_unfinished
from pretrain.config.compose import flat, read_config
from pretrain.config.schema import Config, ConfigError, marked

logger = logging.getLogger(__name__)


class RunFolder:
    """``runs/<name>/``: config.yaml, tokenizer.model, metrics.jsonl, train.log, checkpoints/, samples, summary.json."""

    def __init__(self, config: Config):
        self.path = Path(config.run.root) / config.run.name
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.selection_file = self.path / "selection.jsonl"
        self.bad_batches_file = self.path / "bad_batches.jsonl"
        self.rollbacks_file = self.path / "rollbacks.json"
        self.log_file = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer_file = self.path / "tokenizer.model"
        self.samples_file = self.path / "samples.md"
        self.summary_file = self.path / "summary.json"
        self.profile = self.path / "profile"
        self._lock = FileLock(self.path / ".lock")

    @property
    def latest_checkpoint(self) -> Path | None:
        return latest(self.checkpoints)

    @property
    def rollbacks(self) -> list[int]:
        """The steps whose batches are passed over, because the loss jumped there."""
        if not self.rollbacks_file.exists():
            return []
        try:
            steps = json.loads(self.rollbacks_file.read_text())["steps"]
            if all(isinstance(step, int) for step in steps):
                return steps
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise ConfigError(f"{self.rollbacks_file} lists no steps to pass over; bring it back from a copy")

    def is_finished(self, steps: int) -> bool:
        """Whether a run of ``steps`` steps has come to its end here: nothing is left to do."""
        newest = self.latest_checkpoint
        try:
            return self.summary_file.exists() and newest is not None and read_state(newest)["step"] >= steps
        except Damaged:
            return False  # the run goes on from the one before

    def log_finished(self, steps: int) -> None:
        logger.info("%s is finished at step %d; raise train.steps or choose a new run.name", self.path, steps)

    def report_if_finished(self, config: Config) -> bool:
        """Whether the run of ``config`` is finished here; says so.

        Raises:
            ConfigError: it was finished with other settings.
        """
        if not self.is_finished(config.train.steps):
            return False
        self.check(config)
        self.log_finished(config.train.steps)
        return True

    def check(self, config: Config) -> list[str]:
        """What the settings of an existing run differ in, a line each; [] for a new run.

        Raises:
            ConfigError: the run exists and ``config`` may not go on with it.
        """
        if not self.path.exists() or all(p.name == ".lock" or p.suffix == UNFINISHED for p in self.path.iterdir()):
            return []
        if config.train.resume == "never":
            raise ConfigError(
                f"{self.path} exists; choose another run.name, or train.resume=auto to go on with that run"
            )
        if not self.config_file.exists():
            raise ConfigError(f"{self.path} exists and holds no config.yaml of a run; choose another run.name")
        if self.latest_checkpoint is None:
            return []
        old, new = flat(read_config(self.config_file)), flat(OmegaConf.structured(config))
        # A key that only one of them has belongs to another version of this program, which is no change of settings.
        changed = {k: (old[k], new[k]) for k in sorted(old.keys() & new.keys()) if old[k] != new[k]}
        may_change = marked(config, "may_change")
        refused = [k for k in changed if k not in may_change]
        if refused:
            lines = [f"{k} was {changed[k][0]}, is now {changed[k][1]}" for k in refused]
            raise ConfigError(
                f"{self.path} was trained with other settings; choose another run.name, or put these back:\n"
                + "\n".join(lines)
            )
        return [f"{k}: {was} → {now}" for k, (was, now) in changed.items()]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder.

        Raises:
            ConfigError: a run is at work there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock.acquire(timeout=0):
                yield
        except Timeout:
            raise ConfigError(f"another run is at work in {self.path}; choose another run.name") from None

    def open(self, config: Config, step: int) -> None:
        """Make the folder ready for a run that goes on after ``step``; call on one process, after ``check``."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        text = OmegaConf.to_yaml(OmegaConf.structured(config))
        before = self.config_file.read_text() if self.config_file.exists() else text
        if before != text:
            write_atomic(_unused(self.path / "config.before.yaml"), before)
        write_atomic(self.config_file, text)  # at no moment is there a run without it
        self.checkpoints.mkdir(exist_ok=True)
        remove_unfinished(self.checkpoints)
        for lines in (self.metrics_file, self.selection_file, self.bad_batches_file):
            self._set_lines_after_aside(lines, step, ends_at=config.train.steps)
        for stale in (self.samples_file, self.summary_file):
            if stale.exists():
                stale.rename(_unused(stale.with_suffix(f".before{stale.suffix}")))

    def _set_lines_after_aside(self, file: Path, step: int, ends_at: int) -> None:
        if not file.exists():
            return
        lines = file.read_text().splitlines(keepends=True)
        # The first and the last validation have no checkpoint behind them, and are made again.
        again = [step in (0, ends_at) and _step_of(line) == step and '"val/loss"' in line for line in lines]
        keep = [line for line, repeated in zip(lines, again, strict=True) if _step_of(line) <= step and not repeated]
        if len(keep) < len(lines):
            aside = _unused(file.with_stem(f"{file.stem}.after-step-{step}"))
            write_atomic(aside, "".join(line for line in lines if line not in keep))
            write_atomic(file, "".join(keep))


def _step_of(line: str) -> float:
    """The step of a metric line; a line cut short by a crash counts as later than any."""
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
