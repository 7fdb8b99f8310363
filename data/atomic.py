"""Writes of whole files that survive a crash, and checksums of files."""

import hashlib
import os
from pathlib import Path

UNFINISHED = ".tmp"
"""Ends the name of a file or folder that is still being written."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Make `content` (text as UTF-8) the content of the file `path`.

    A reader sees the old content or the new one, never a part, also after a crash: the content goes to a temporary
    file in the same folder, which is flushed to the disk and then renamed.

    Raises:
        OSError: The file cannot be written; the old content is still there.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(temporary)
    temporary.replace(path)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Without it a rename can reach the disk before the content of the renamed file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
