"""Files that are whole or not there: written beside their place, put on the disk, and renamed."""

import hashlib
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


def _write_synced(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
