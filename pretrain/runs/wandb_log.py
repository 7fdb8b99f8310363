"""Log a run to Weights & Biases: metric and log lines, and at its end tables, the coverage picture and a checkpoint.

A failure of W&B never ends the training run, which continues with an offline W&B run, or else without W&B, and logs a
warning. metrics.jsonl has every line in any case.
"""

import io
import logging
import math
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from data.atomic import write_atomic
from pretrain.checkpoint.directory import latest
from pretrain.config.schema import Config, WandbConfig
from pretrain.runs.json_lines import read_json_lines
from pretrain.runs.records import RunRecords

logger = logging.getLogger(__name__)

VALIDATION = ["step", "tokens", "val/loss", "val/perplexity", "val/bits_per_byte"]
ID_FILE = "wandb_id.txt"
# Settings of ours that W&B's own environment variables override: name in wandb.Settings, variable, value.
SETTINGS = [
    ("silent", "WANDB_SILENT", True),
    ("console", "WANDB_CONSOLE", "off"),  # a capture of the terminal would replace the streams of the progress bar
    ("init_timeout", "WANDB_INIT_TIMEOUT", 20.0),  # seconds for an online start; after them the run starts offline
    ("finish_timeout", "WANDB_FINISH_TIMEOUT", 300.0),  # seconds for the rest of the upload at the end of the run
    ("finish_timeout_raises", "WANDB_FINISH_TIMEOUT_RAISES", True),
]

CHECKPOINT_SECONDS = 3600.0  # instead of finish_timeout, if a checkpoint is uploaded
ALERT_SECONDS = 600.0  # least time between two alerts of one title
LOWEST = "val/loss_min"  # in the summary: W&B's own summary="min" starts again when a run resumes
MOST_OF_A_TAG = 64  # characters


class WandbLogger:
    """The W&B run of a training run; does nothing if it is disabled or cannot be started.

    Args:
        folder: the folder of the run.
        sizes: numbers of parameters and bytes by name, shown with the settings from the start.
        log_start: number of bytes in train.log that the run's earlier processes wrote. The lines after them are sent to
            the Logs tab at the start, and later ones as they are logged.
    """

    def __init__(self, config: Config, folder: Path, sizes: Mapping[str, Any] | None = None, log_start: int = 0):
        self._config, self._folder, self._sizes, self._log_start = config, folder, sizes or {}, log_start
        self._lowest = math.inf  # validation loss
        self._run: Any = None
        self._modes = list[str]()  # still to be tried
        self._advice = ""
        if config.logger.wandb.mode != "disabled":
            losses = (line.get("val/loss") for line in read_json_lines(folder / "metrics.jsonl"))
            self._lowest = min((loss for loss in losses if loss is not None), default=math.inf)
            if not self._try("start", lambda: self._modes.extend(_modes(config.logger.wandb.mode))):
                self._modes = ["offline"]
            self._start_next()

    def log(self, line: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl. If W&B's process has died, an offline run gets this line and later ones."""
        if not self._try("log", lambda: self._log(line)) and self._start_next():
            self._try("log", lambda: self._log(line))

    def log_results(self, samples: list[tuple[str, str]]) -> None:
        """Log a table of the validations, the samples, and a picture of the rows that Grass has ever selected.

        With ``logger.wandb.log_checkpoint`` the newest checkpoint is uploaded too.

        Args:
            samples: pairs of a prompt, and the prompt with its continuation.
        """
        self._try("log the results", lambda: self._run.log(_results(self._folder, samples)))
        if self._config.logger.wandb.log_checkpoint:
            self._try("log the checkpoint", lambda: _log_checkpoint(self._run, self._folder))

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the run's summary, and wait until W&B has written or uploaded everything."""
        self._try("log the summary", lambda: self._run.summary.update(summary))
        self._try("finish", lambda: self._run.finish())
        self._forget_run()

    def _log(self, line: dict[str, Any]) -> None:
        self._run.log(line)
        if (loss := line.get("val/loss")) is not None:
            self._lowest = min(self._lowest, loss)
            self._run.summary.update({LOWEST: self._lowest})

    def _start_next(self) -> bool:
        """Start in the next mode that works; returns whether there is one."""
        while self._run is None and self._modes:
            mode = self._modes.pop(0)
            if not self._try(f"start {mode}", partial(self._start, mode)):
                self._modes = [other for other in self._modes if other != mode]
        return self._run is not None

    def _start(self, mode: str) -> None:
        self._run = _init(self._config, self._folder, mode, self._sizes)
        self._advice = f"; the run goes online with: {_sync_command(self._run)}"
        self._send_log_lines()
        if self._run.offline:
            logger.info("W&B is offline%s", self._advice)
        else:
            logger.info("W&B is %s: %s", mode, self._run.url)

    def _send_log_lines(self) -> None:
        file = self._folder / "train.log"
        if file.exists() and (lines := file.read_bytes()[self._log_start :]):
            self._run.write_logs(lines.decode(errors="replace"))
            self._log_start += len(lines)
        _remove_logs_tab()  # of a run that an error ended
        logging.getLogger().addHandler(_LogsTab(self._run))

    def _try(self, action: str, call: Callable[[], object]) -> bool:
        """Whether ``call`` succeeded; a failure is logged, and ends this run of W&B's."""
        if self._run is None and not action.startswith("start"):
            return True
        try:
            call()
        except Exception as error:  # whatever W&B raises must not end the training
            logger.warning("W&B could not %s: %s%s", action, error or type(error).__name__, self._advice)
            self._stop()
            return False
        return True

    def _stop(self) -> None:
        """End W&B's own process, which would refuse to start another run of the same id."""
        self._forget_run()
        if wandb := sys.modules.get("wandb"):
            with suppress(Exception):  # it may have died
                wandb.teardown()

    def _forget_run(self) -> None:
        _remove_logs_tab()
        self._run, self._advice = None, ""


class _LogsTab(logging.Handler):
    """Sends log lines to the Logs tab of a W&B run, in the form of train.log.

    A line that is logged with ``extra={"alert": title}`` is also sent as an alert, which W&B mails to the user.
    """

    def __init__(self, run: Any):
        super().__init__()
        self._run = run
        self._alerted = dict[str, float]()  # time of the latest alert of each title
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # the next metric line reports that W&B failed
            self._run.write_logs(self.format(record))
            title, now = getattr(record, "alert", None), time.monotonic()
            if title and now >= self._alerted.get(title, -math.inf) + ALERT_SECONDS:
                self._alerted[title] = now
                self._run.alert(title, record.getMessage(), level="WARN", wait_duration=ALERT_SECONDS)


def _modes(configured: str) -> list[str]:
    """The modes to try, in order: the one to use, and offline in case that fails; [] if W&B is disabled.

    ``auto`` is the mode that WANDB_MODE or W&B's settings files name, or else online after a login, otherwise offline.
    """
    import wandb  # here and below: a broken installation must not end a run

    for variable in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[variable]  # W&B takes an empty variable for a value, and refuses it
    mode = configured
    if configured == "auto":
        settings = wandb.setup(wandb.Settings(**_unless_set(SETTINGS))).settings
        named = os.environ.get("WANDB_MODE") or settings.mode != "online"
        mode = settings.mode if named or wandb.login(prompt=False, verify=False) else "offline"
    if mode == "disabled":
        logger.info("W&B is disabled")
        return []
    return [mode, "offline"]


def _remove_logs_tab() -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LogsTab)]:
        root.removeHandler(handler)


def wandb_problems(wandb: WandbConfig) -> list[str]:
    """A line for each tag that W&B would refuse."""
    limit = f"a tag has 1 to {MOST_OF_A_TAG} characters"
    return [
        f"logger.wandb.tags: {tag!r} has {len(tag)} characters; {limit}"
        for tag in wandb.tags
        if not 1 <= len(tag) <= MOST_OF_A_TAG
    ]


def _init(config: Config, folder: Path, mode: Any, sizes: Mapping[str, Any]) -> Any:
    """The W&B run, started in ``mode``.

    W&B's environment variables give the settings that are null in the configuration, and replace our defaults.
    """
    import wandb

    ours, id_file = config.logger.wandb, folder / ID_FILE
    if not id_file.exists():
        write_atomic(id_file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    explicit = {"project": ours.project, "entity": ours.entity, "group": ours.group, "tags": ours.tags or None}
    derived = [
        ("project", "WANDB_PROJECT", "grass"),
        ("group", "WANDB_RUN_GROUP", "/".join(Path(config.run.name).parts[:-1]) or config.model.name),
        ("name", "WANDB_NAME", Path(config.run.name).name),
        ("job_type", "WANDB_JOB_TYPE", config.optim.name),
        ("id", "WANDB_RUN_ID", id_file.read_text(encoding="utf-8").strip()),
        ("resume", "WANDB_RESUME", "allow"),
        ("dir", "WANDB_DIR", str(folder)),
    ]
    arguments = _unless_set(derived) | {key: value for key, value in explicit.items() if value is not None}
    settings = _unless_set(SETTINGS)
    if ours.log_checkpoint and "finish_timeout" in settings:
        settings["finish_timeout"] = CHECKPOINT_SECONDS
    shown = asdict(config) | dict(sizes)
    run = wandb.init(mode=mode, config=shown, settings=wandb.Settings(**settings), **arguments)
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def _unless_set(values: list[tuple[str, str, Any]]) -> dict[str, Any]:
    return {name: value for name, variable, value in values if not os.environ.get(variable)}


def _sync_command(run: Any) -> str:
    """The shell command that uploads ``run``, and the W&B runs of earlier starts with the same id and mode."""
    script, folder = Path(sys.executable).with_name("wandb"), Path(run.settings.sync_dir)
    program = shlex.join([os.path.relpath(script)] if script.exists() else [sys.executable, "-m", "wandb"])
    option, kind = ("", "offline-run") if run.offline else ("--include-online ", "run")
    return f"{program} sync {option}{shlex.quote(str(folder.parent))}/{kind}-*-{shlex.quote(run.id)}"


def _results(folder: Path, samples: list[tuple[str, str]]) -> dict[str, Any]:
    import wandb

    data = RunRecords(folder, folder.name)
    lines = [[line[name] for name in VALIDATION] for line in data.lines if "val/loss" in line]
    shown: dict[str, Any] = {"tokens": data.lines[-1]["tokens"], "validation": wandb.Table([*VALIDATION], data=lines)}
    if samples:
        shown["samples"] = wandb.Table(["prompt", "text"], data=[list(sample) for sample in samples])
    if picture := _coverage_picture(data):
        shown["coverage"] = wandb.Image(picture)
    return shown


def _coverage_picture(data: RunRecords) -> Any:
    from PIL import Image

    from pretrain.runs.figures import plot_coverage  # matplotlib takes a second to import, at the end of a run only

    if (figure := plot_coverage(data)) is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, dpi=200)
    return Image.open(file)


def _log_checkpoint(run: Any, folder: Path) -> None:
    import wandb

    if (newest := latest(folder / "checkpoints")) is None:
        return
    step = RunRecords(folder, folder.name).step
    artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": step})
    for path in (newest, *(folder / name for name in ("config.yaml", "tokenizer.model", "tokenizer.json"))):
        if path.exists():
            artifact.add_dir(str(path), path.name) if path.is_dir() else artifact.add_file(str(path))
    run.log_artifact(artifact)
