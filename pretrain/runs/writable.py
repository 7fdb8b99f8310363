"""Check that a run folder can be written, before anything is read or computed for the run."""

import errno
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pretrain.config.schema import ConfigError

PATIENCE = 5.0  # seconds to wait until other processes have finished the same check


def require_writable(root: str, name: str) -> None:
    """Check that the run folder ``root/name`` can be created and written: create it and a file, and remove both.

    Checking permissions is not enough: a disk can be read-only, and /proc cannot contain new folders.

    Raises:
        ConfigError: the folder cannot be created or written; names ``run.root`` or ``run.name``, and the reason.
    """
    folder = path = Path(root, name)
    made = list[Path]()
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                for folder in [*reversed(path.parents), path]:
                    _make(folder, made)
                with tempfile.TemporaryFile(dir=path, prefix="."):  # hidden: no part of a run, see RunFolder.check
                    break
            except FileNotFoundError:  # another process of this run, or of a sweep, removes the folder it created
                if time.monotonic() > deadline:
                    raise
    except OSError as error:
        in_root = folder in (Path(root), *Path(root).parents)
        key, value = ("run.root", root) if in_root else ("run.name", name)
        shown = value if len(value) <= 100 else f"{value[:40]}…"
        raise ConfigError(f"{key}={shown}: {_reason(error, folder, key)}") from None
    finally:
        for made_here in reversed(made):
            with suppress(OSError):  # another process of the run has created something there
                made_here.rmdir()


def _make(folder: Path, made: list[Path]) -> None:
    """Create ``folder`` unless it exists, and add it to ``made``."""
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISDIR(mode):
        raise FileExistsError(errno.EEXIST, "it is a file")
    try:
        if mode is None:
            folder.mkdir()
            made.append(folder)
    except FileExistsError:
        if folder.is_symlink():  # a broken link; otherwise another process has just created the folder
            raise


def _reason(error: OSError, folder: Path, key: str) -> str:
    if error.errno == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in folder.parts)
        return f"a name of {longest} bytes is too long for this disk; shorten {key}"
    return f"{folder} cannot be written ({error.strerror}); choose another {key}"
