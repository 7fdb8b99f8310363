"""Train a run for each combination of settings: ``./launch.sh -m optim.rank=64,128 optim.lr=1e-3,3e-3``.

Hydra's sweepers make the combinations, and its launchers run them. Each job is a separate launch, in the folder
``<run.root>/<run.name or "sweep">/<name made of its overrides>``. The same command again resumes unfinished jobs. Exit
codes: 0 all finished, 1 some failed, 2 a setting to fix before the first job, 85 stopped by a signal.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from data.wording import python_command
from pretrain.cli.console import log_to_terminal
from pretrain.cli.errors import clear_errors
from pretrain.cli.signals import EXIT_CODE
from pretrain.config.command_line import MULTIRUN, answer_flags, run_hydra, split_arguments
from pretrain.config.compose import load
from pretrain.config.schema import Config, ConfigError
from pretrain.config.text import QUOTED, as_typed, quoted
from pretrain.runs.sweep_results import LOGS, JobResult, results
from pretrain.runs.writable import require_writable

logger = logging.getLogger(__name__)
FIXED = "fixed.json"  # in the sweep's folder of logs: the overrides that all jobs share
TOTAL = "total"  # in the same folder: the number of jobs, unless a sweeper decides it
STOP = "stop"  # in the same folder: asks every job to save and stop, and prevents new jobs
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "optuna": "hydra_optuna_sweeper",
    "slurm": "hydra_submitit_launcher",
    "submitit": "hydra_submitit_launcher",
}  # by the first word of the launcher's or sweeper's name


def run_sweep(overrides: Sequence[str], root: str = "runs/sweep", jobs: int = 1, processes: int = 1) -> list[JobResult]:
    """Train one run for each combination of the alternatives in ``overrides``. Runs that are finished are not repeated.

    Args:
        overrides: settings with commas between alternatives, such as "optim.rank=32,64".
        root: the folder of the sweep, which gets a folder for each run.
        jobs: the number of jobs that run at a time.
        processes: the number of processes of each job.

    Returns:
        The results of all jobs in order, including failed and stopped jobs; see ``JobResult``.

    Raises:
        ConfigError: the sweep could not start; standard error gives the reason.
    """
    folder, logs = Path(root), _new_logs(Path(root))
    arguments = [*overrides, f"run.root={quoted(folder.parent)}", f"run.name={quoted(folder.name)}"]
    if jobs > 1:
        arguments += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
    command = [sys.executable, "-m", "pretrain.sweep", *arguments, f"hydra.sweep.dir={quoted(logs)}"]
    code = subprocess.run(command, env={**os.environ, "PET_NPROC_PER_NODE": str(processes)}).returncode
    if code == 2:
        raise ConfigError(f"the sweep in {root} could not start: see above")
    return results(logs)


def job_name(swept: Sequence[str], fixed: Sequence[str] = ()) -> str:
    """The name of a job's folder, made of its ``key=value`` overrides in any order, such as ``lr-0.001_rank-64``.

    Overrides of ``run.``, ``logger.`` and ``data.root`` are omitted, because they do not change results. If no override
    is left, the name is "default".

    Args:
        swept: the overrides in which the jobs differ, for the first part of the name.
        fixed: the overrides that all jobs share, for the second part. A part that is too long, or has characters that a
            file system may refuse, is shortened and gets a hash.
    """
    keys = [key for key, _ in _settings([*swept, *fixed])]
    texts = []
    for settings, longest in ((_settings(swept), 100), (_settings(fixed), 40)):
        last = [key.rpartition(".")[2] for key in keys]
        short = {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
        text = "_".join(f"{short[key]}-{value}" for key, value in settings)
        safe = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
        texts.append(safe if safe == text and len(text) <= longest else f"{safe[: longest - 40]}{digest}")
    return "_".join(filter(None, texts)) or "default"


def _settings(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values, without quotes around a value."""
    counted = (o.lstrip("+~") for o in overrides if not o.startswith(("run.", "logger.", "data.root=")))
    pairs = (o.partition("=")[::2] for o in counted)
    return sorted((key, value[1:-1] if QUOTED.fullmatch(value) else value) for key, value in pairs)


# One job, in the process of Hydra's launcher.


def run_job(cfg: DictConfig) -> float | None:
    """Train the run of ``cfg``, in separate processes, and write its ``JobResult``. Hydra calls this for each job.

    Returns:
        The final validation loss, which a sweeper such as Optuna can minimise; None if the run did not finish.
    """
    log_to_terminal(is_main=True)  # the process of a launcher may have no log yet
    settings = HydraConfig.get()
    logs, number = Path(settings.runtime.output_dir), settings.job.num
    overrides = [o for o in settings.overrides.task if not o.startswith("run.")]
    fixed = set(json.loads((logs / FIXED).read_text()))
    name = job_name([o for o in overrides if o not in fixed], [o for o in overrides if o in fixed])
    result = JobResult(name, overrides, str(Path(cfg.run.root) / cfg.run.name / name), str(logs / f"{name}.log"))
    if not (logs / STOP).exists():
        total = f" of {(logs / TOTAL).read_text()}" if (logs / TOTAL).exists() else ""
        logger.info("sweep: job %d%s, %s, starts; its output is in %s", number + 1, total, name, result.log)
        place = [f"run.root={quoted(cfg.run.root)}", f"run.name={quoted(f'{cfg.run.name}/{name}')}"]
        command = [sys.executable, "-m", "pretrain.launch", "-m", "pretrain.train", *overrides, *place]
        with Path(result.log).open("a") as log:
            result.exit_code = _attend(command, log, _environment(settings), logs / STOP)
        logger.info("sweep: %s %s%s", name, result.status, f": {result.reason}" if result.status == "failed" else "")
    (logs / f"{number}.json").write_text(json.dumps(asdict(result)) + "\n")
    return result.summary["val/loss"] if result.summary else None


def _environment(settings: Any) -> dict[str, str]:
    """The job's environment: on a CPU, the cores are divided among all running jobs and processes, as in launch.sh."""
    import torch  # here, because importing torch takes seconds: not for --help

    environment, cores = dict(os.environ), len(os.sched_getaffinity(0))
    jobs = int(settings.launcher.get("n_jobs", 1))
    at_work = int(environment.get("PET_NPROC_PER_NODE", "1")) * (jobs if jobs > 0 else cores)
    if not torch.cuda.is_available():
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // at_work)))
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def _attend(command: list[str], log: Any, environment: dict[str, str], stop: Path) -> int:
    """Run ``command`` to its end and return its exit code; send it SIGTERM once when the file ``stop`` appears."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in a launcher's process: the sweep handles it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A separate session, because otherwise a Ctrl-C in the terminal would reach the job twice.
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    asked = False
    while True:
        try:
            code = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if not asked and stop.exists():
                process.terminate()
                asked = True
        else:  # a job that was ended by the signal had nothing to save yet
            return EXIT_CODE if asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM) else code


# The sweep around the jobs.


def main() -> None:
    log_to_terminal(is_main=True)
    for noisy in ("hydra", "hydra_plugins"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with clear_errors():
        flags, overrides = split_arguments(sys.argv[1:])
        flags = [flag for flag in flags if flag not in MULTIRUN]
        if flags:
            answer_flags(flags, overrides)
        overrides, logs = begin(overrides)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, partial(_ask_to_stop, logs))
    code: Any = 0
    try:
        run_hydra(["--multirun", *as_typed(overrides, sweep=True)], run_job)
    except SystemExit as error:
        code = error.code
    sys.exit(report(results(logs)) or code)


def begin(arguments: list[str]) -> tuple[list[str], Path]:
    """Check the overrides of every combination, and create the folder of logs.

    Args:
        arguments: the overrides of the command line, such as "optim.rank=32,64".

    Returns:
        The overrides for Hydra: ``arguments``, the name of the sweep, and settings of the folder of logs.
        The folder of logs.

    Raises:
        ConfigError: lists every override that is wrong.
    """
    parsed = parse(arguments)
    settings = [o for o in parsed if not o.get_key_element().startswith("hydra")]
    if swept := [o.input_line for o in settings if o.get_key_element().startswith("run.") and o.is_sweep_override()]:
        raise ConfigError(f"{', '.join(map(str, swept))}: every job gets its own name; give the sweep one name")
    given, jobs = {o.get_key_element(): o for o in parsed}, combinations(settings)
    config = _checked(jobs, every="hydra/sweeper" not in given, named="run.name" in given)
    _check_plugins(str(given[group].value()) for group in ("hydra/launcher", "hydra/sweeper") if group in given)
    name = config.run.name if "run.name" in given else "sweep"
    require_writable(config.run.root, name)
    where = given.get("hydra.sweep.dir")
    logs = Path(str(where.value())) if where else _new_logs(Path(config.run.root) / name)
    logs.mkdir(parents=True, exist_ok=True)
    (logs / FIXED).write_text(json.dumps(combinations([o for o in settings if not o.is_sweep_override()])[0]))
    if "hydra/sweeper" not in given:
        (logs / TOTAL).write_text(str(len(jobs)))
    return [*arguments, f"run.name={quoted(name)}", f"hydra.sweep.dir={quoted(logs)}", "hydra.sweep.subdir=."], logs


def _checked(jobs: list[list[str]], every: bool, named: bool) -> Config:
    """The configuration of the last of ``jobs``, each given by its overrides.

    Args:
        every: also check the values of all jobs; False for a sweeper that chooses jobs, because some may be wrong.
        named: whether ``run.name`` is given; otherwise the sweep's folder is ``run.root``/sweep.

    Raises:
        ConfigError: lists the problems of all jobs.
    """
    problems: dict[str, None] = {}
    for job in jobs:
        try:
            config = load(job)
            if config.train.dry_run:
                raise ConfigError("train.dry_run=true plans one run; give it to ./launch.sh without -m")
            if every:
                from pretrain.setup.checks import check  # only here, because it imports torch, which takes seconds

                folder = Path(config.run.root) / (config.run.name if named else "sweep")
                resumes = any(folder.glob("*/checkpoints/step-*"))
                check(config, int(os.environ.get("PET_NPROC_PER_NODE", "1")), needs_data=False, resumes=resumes)
        except ConfigError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def parse(arguments: list[str]) -> list[Override]:
    """Parse the overrides ``arguments`` with Hydra.

    Raises:
        ConfigError: an override is not valid in Hydra's grammar.
    """
    try:
        return OverridesParser.create().parse_overrides(as_typed(arguments, sweep=True))
    except HydraException as error:
        raise ConfigError(str(error)) from None


def combinations(settings: list[Override]) -> list[list[str]]:
    """The overrides of each job. Continuous ranges are omitted: only a sweeper such as Optuna chooses their values."""
    discrete = [o for o in settings if not o.is_sweep_override() or o.is_discrete_sweep()]
    return BasicSweeper.split_arguments(discrete, None)[0]


def _check_plugins(choices: Iterable[str]) -> None:
    for choice in choices:
        package = PLUGINS.get(choice.partition("_")[0])
        if package and importlib.util.find_spec(f"hydra_plugins.{package}") is None:
            fix = "run .venv/bin/pip install -r requirements-sweep.txt"
            raise ConfigError(f"{choice} needs the package {package}, which is not installed; {fix}")


def _new_logs(folder: Path) -> Path:
    """A new folder for the logs of one sweep."""
    logs = folder.resolve() / LOGS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs.mkdir(parents=True)
    return logs


def _ask_to_stop(logs: Path, number: int, _frame: Any) -> None:
    (logs / STOP).touch()
    logger.info("sweep: the jobs save and stop; the same command resumes them")
    signal.signal(number, signal.SIG_DFL)  # a second signal ends this process at once, while the jobs still save


def report(jobs: list[JobResult]) -> int:
    """Print a line for each job, and log the command that compares the jobs.

    Returns:
        The exit code of the sweep: 0 if all jobs finished, 85 if any was stopped or not started, otherwise 1.
    """
    width = max((len(job.name) for job in jobs), default=0)
    losses = [job.summary["val/loss"] for job in jobs if job.summary]
    for job in jobs:
        numbers, reason = "", f"{job.reason} (see {job.log})" if job.status == "failed" else ""
        if summary := job.summary:
            best = "  best" if len(losses) > 1 and summary["val/loss"] == min(losses) else ""
            numbers = f"validation loss {summary['val/loss']:.4f}, {summary['tokens_per_s']:,.0f} tokens/s{best}"
        print(f"{job.name:<{width}}  {job.status:<11}  {numbers}{reason}".rstrip(), flush=True)
    if losses:
        folder = Path(os.path.relpath(Path(jobs[0].folder).parent))
        folder = folder if ".." not in folder.parts else folder.resolve()
        logger.info("to compare the jobs on a page: %s", python_command("pretrain.report", str(folder)))
    statuses = {job.status for job in jobs}
    return EXIT_CODE if {"stopped", "not started"} & statuses else 0 if statuses == {"finished"} else 1


if __name__ == "__main__":
    from pretrain import sweep

    sweep.main()  # under its module name, so that the processes of a launcher can import run_job
