"""Files of JSON lines: a run appends to them, and reports read them."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLinesFile:
    """Appends JSON lines to the file ``path``.

    If a line cannot be written, a warning is logged once. The line is kept in memory and written as soon as possible.
    """

    def __init__(self, path: Path):
        self.path, self._pending, self._failing = path, b"", False

    def write(self, line: dict[str, Any]) -> None:
        self._pending += json.dumps(line).encode() + b"\n"
        try:
            with self.path.open("ab", buffering=0) as file:  # opened each time: the folder may have been replaced
                while self._pending:
                    self._pending = self._pending[file.write(self._pending) :]
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s cannot be written (%s); the run continues and keeps the lines until they can be written",
                    *(self.path, error.strerror or error),
                )
            self._failing = True
        else:
            if self._failing:
                logger.warning("%s can be written again; no line is lost", self.path)
            self._failing = False


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Parse each line of ``file``. A missing file has no lines.

    Lines that are not complete JSON, such as a half-written last line, are skipped.
    """
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
