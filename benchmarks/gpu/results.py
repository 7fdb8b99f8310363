"""The result file of the benchmark, ``gpu.json``. It is written after every row, so that a crash loses no row.

    {"sections": {name: record}}, and a record is
    {"began", "commit", "dry", "device", "computes", "torch", "seconds", "ended", "rows": [{…}, …]}

``computes`` is false for a stand-in for a GPU whose kernels do nothing. ``ended`` is "done", "running", or the reason
why the section stopped. ``rows`` are the rows that the section reported.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from data.atomic import write_atomic
from pretrain.runs.code_version import git_commit

FILE = "gpu.json"
DONE, RUNNING = "done", "running"
Row = dict[str, Any]
Record = dict[str, Any]


def load(path: Path) -> dict[str, Record]:
    """Return the records of a result file by section.

    Raises:
        ValueError: the file is missing or is no result file.
    """
    try:
        sections = json.loads(path.read_text())["sections"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result file of python -m benchmarks.gpu ({error})") from None
    return sections


class Results:
    """Writes ``gpu.json`` in ``folder``.

    A section that runs again replaces its earlier record when it reports its first row. If it fails before that, the
    earlier record stays.
    """

    def __init__(self, folder: Path, dry: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.dry, self.commit = folder / FILE, dry, git_commit()
        self.sections = load(self.path) if self.path.exists() else {}
        self.current: Record = {}

    def begin(self, name: str) -> None:
        """Begin the record of the section ``name``."""
        self.name = name
        self.current = {
            "began": datetime.now().isoformat(timespec="seconds"), "commit": self.commit, "dry": self.dry,
            "seconds": 0.0, "ended": RUNNING, "rows": [],
        }  # fmt: skip

    def add(self, row: Row) -> None:
        """Add a row to the current section and write the file."""
        self.current["rows"].append(row)
        self._write()

    def end(self, seconds: float, ended: str) -> None:
        """Close the section. ``ended`` is "done", or the reason why it stopped."""
        self.current |= {"seconds": round(seconds, 1), "ended": ended}
        if self.current["rows"] or self.name not in self.sections:
            self._write()

    def _write(self) -> None:
        self.sections[self.name] = self.current
        write_atomic(self.path, json.dumps({"sections": self.sections}, indent=1) + "\n")
