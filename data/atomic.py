"""Atomic writes and checksums of files."""

import errno
import hashlib
import logging
import os
import stat
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

UNFINISHED = ".tmp"
"""The suffix of the name of a file or folder that is still being written."""
NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def write_atomic(path: Path, content: str | bytes) -> None:
    """Make `content` (text as UTF-8) the content of the file `path`.

    A reader sees either the old or the new complete content, even after a crash: the content is written to a temporary
    file in the same folder, which is flushed to disk and then renamed.

    Raises:
        OSError: The file cannot be written; the old content is still there.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(temporary)
    temporary.replace(path)


def use_umask(path: Path) -> None:
    """Give the file `path` the permissions of a new file; some libraries create files that only the owner can read."""
    probe = path.with_name(path.name + UNFINISHED)
    probe.touch()
    path.chmod(stat.S_IMODE(probe.stat().st_mode))
    probe.unlink()


def fsync(file: Path | int) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Without this call, a rename can reach the disk before the content of the renamed file. If the file system does not
    support fsync, a warning is logged once.

    Args:
        file: A path, or the descriptor of an open file.
    """
    descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        _log_once(f"the file system does not support fsync ({error.strerror}); a power failure may lose the last files")
    finally:
        if descriptor is not file:
            os.close(descriptor)


@cache
def _log_once(warning: str) -> None:
    logger.warning("%s", warning)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
