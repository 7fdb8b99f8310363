"""What a finished run shows on W&B beside its metrics: tables, the picture of rows ever selected, a checkpoint."""

import io
import logging
import netrc
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from data.atomic import write_atomic
from pretrain.checkpoint import tensors as checkpoint
from pretrain.config.schema import Config
from pretrain.runs.records import RunRecords

VALIDATION = ["step", "tokens", "val/loss", "val/perplexity", "val/bits_per_byte"]


def log_results(run: Any, folder: Path, samples: list[tuple[str, str]], with_checkpoint: bool) -> None:
    """Log the results of the run in ``folder`` to the W&B ``run``; ``samples`` are prompts and what followed."""
    data = RunRecords(folder, folder.name)
    lines = [[line[name] for name in VALIDATION] for line in data.lines if "val/loss" in line]
    shown: dict[str, Any] = {"tokens": data.lines[-1]["tokens"], "validation": wandb.Table([*VALIDATION], data=lines)}
    if samples:
        shown["samples"] = wandb.Table(["prompt", "continuation"], data=[list(sample) for sample in samples])
    if picture := _coverage(data):
        shown["coverage"] = wandb.Image(picture)
    run.log(shown)
    if with_checkpoint and (newest := checkpoint.latest(folder / "checkpoints")):
        artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": data.step})
        for path in (newest, folder / "config.yaml", folder / "tokenizer.model", folder / "tokenizer.json"):
            if path.exists():
                artifact.add_dir(str(path), path.name) if path.is_dir() else artifact.add_file(str(path))
        run.log_artifact(artifact)


def _coverage(data: RunRecords) -> Any:
    from PIL import Image

    from pretrain.runs import figures as pictures  # matplotlib takes a second to import, at the end of a run only

    if (figure := pictures.coverage(data, "wide")) is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return Image.open(file)


logger = logging.getLogger(__name__)

INIT_SECONDS = 20  # how long an online start may take before the run goes on offline


class WandbLogger:
    """The W&B run of a training run; does nothing when disabled, or from the first failure on, which is said."""

    def __init__(self, config: Config, folder: Path):
        self._run: Any = None
        self._folder, self._with_checkpoint = folder, config.logger.wandb.log_checkpoint
        mode = config.logger.wandb.mode
        if mode == "auto":
            mode = "online" if _logged_in() else "offline"
        if mode == "disabled":
            return
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._run = _start(config, folder, attempt)
            except Exception as error:  # no network, no rights, a broken install: the run goes on without
                logger.warning("W&B could not start %s: %s", attempt, error)
            else:
                program = os.path.relpath(Path(sys.executable).with_name("wandb"))
                where = (
                    "" if attempt == "online" else f"; it goes online by: {program} sync {folder}/wandb/offline-run-*"
                )
                logger.info("W&B is %s%s", attempt, where)
                return

    def log(self, line: dict[str, Any]) -> None:
        self._try(lambda: self._run.log(line))

    def log_results(self, samples: list[tuple[str, str]]) -> None:
        """Tables and pictures of the finished run, and its newest checkpoint if ``logger.wandb.log_checkpoint``."""

        def call() -> None:
            from pretrain.runs.wandb_log import log_results

            log_results(self._run, self._folder, samples, self._with_checkpoint)

        self._try(call)

    def finish(self, summary: dict[str, Any]) -> None:
        self._try(lambda: (self._run.summary.update(summary), self._run.finish()))

    def _try(self, call: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # a logger must not end a run, whatever it raises
            logger.warning("W&B failed and is off from here on: %s", error)
            self._run = None


def _start(config: Config, folder: Path, mode: Any):
    import wandb  # here, so that a broken install is one more thing that ends nothing

    settings, id_file = config.logger.wandb, folder / "wandb_id.txt"
    if not id_file.exists():
        write_atomic(id_file, wandb.sdk.lib.runid.generate_id())
    run = wandb.init(
        mode=mode,
        project=settings.project,
        entity=settings.entity,
        group=settings.group or _group(config.run.name) or config.model.name,
        name=Path(config.run.name).name,
        job_type=config.optim.name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(folder),
        config=asdict(config),
        settings=wandb.Settings(silent=True, init_timeout=INIT_SECONDS, console="off"),
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def _group(name: str) -> str:
    """The folder of a run's name: what the jobs of a sweep share."""
    return "/".join(Path(name).parts[:-1])


def _logged_in() -> bool:
    """Whether there is an API key, in the environment or where ``wandb login`` puts it; asks no server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    hosts = ("api.wandb.ai", "api.forge.coreweave.com", urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc)
    return any(host in known.hosts for host in hosts)
