"""Results of the jobs of a sweep."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cli.signals import EXIT_CODE

LOGS = "_sweeps"  # folder in the sweep's folder, with the output and the result of each job
STATUSES = {0: "finished", EXIT_CODE: "stopped"}


@dataclass
class JobResult:
    """The result of one job of a sweep.

    ``status`` is finished, failed, stopped (by a signal, after saving) or not started (the sweep was stopped before).
    """

    name: str  # of the run's folder below the sweep's
    overrides: list[str]
    folder: str
    log: str  # the file with the job's output
    exit_code: int | None = None  # None: not started

    @property
    def status(self) -> str:
        return "not started" if self.exit_code is None else STATUSES.get(self.exit_code, "failed")

    @property
    def summary(self) -> dict[str, Any] | None:
        """The run's summary.json; None for a run that did not finish."""
        file = Path(self.folder) / "summary.json"
        return json.loads(file.read_text()) if self.status == "finished" and file.exists() else None

    @property
    def reason(self) -> str:
        """Why a job failed: the last line of its output that begins with "error", or else the very last line."""
        text = Path(self.log).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return next(
            (line for line in reversed(lines) if line.startswith(("error: ", "error on rank "))),
            (lines or ["it printed nothing"])[-1],
        )


def results(logs: Path) -> list[JobResult]:
    """The results in ``logs``, the folder of logs of one sweep, in the order of the jobs."""
    files = sorted(logs.glob("[0-9]*.json"), key=lambda file: int(file.stem))
    return [JobResult(**json.loads(file.read_text())) for file in files]
