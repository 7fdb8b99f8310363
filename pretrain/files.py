"""Files that are whole or not there: written beside their place, put on the disk, and renamed."""

import os
from pathlib import Path

UNFINISHED = ".tmp"


def write_whole(path: Path, content: str | bytes) -> None:
    """Make ``content`` that of the file ``path``; a reader, also after a crash, sees all of it or what was there."""
    beside = path.with_name(path.name + UNFINISHED)
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    to_disk(beside)
    beside.replace(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk: a rename may otherwise get there first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
