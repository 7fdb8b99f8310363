"""The commit of this code, for the summary of a run."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def git_commit() -> str | None:
    """The checked-out commit of this code (40 hex digits), with "-dirty" if tracked files differ; None if unknown."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:  # a repository that contains this folder
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
