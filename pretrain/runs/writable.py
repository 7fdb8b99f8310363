"""Check that a run folder can be written, before anything is read or computed for it."""

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pretrain.config.schema import ConfigError


def require_writable(root: str, name: str) -> None:
    """Make the run folder ``root/name`` and a file in it, and remove again whatever was made.

    Permissions alone do not tell: a disk can be read-only, and /proc takes no folders.

    Raises:
        ConfigError: the folder cannot be made or written; names the key, ``run.root`` or ``run.name``, and the reason.
    """
    path, made = Path(root, name), list[Path]()
    folder = path
    try:
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
            elif not folder.is_dir():
                raise FileExistsError(errno.EEXIST, "it is a file")
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        in_root = folder in (Path(root), *Path(root).parents)
        key, value = ("run.root", root) if in_root else ("run.name", name)
        shown = value if len(value) <= 100 else f"{value[:40]}…"
        raise ConfigError(f"{key}={shown}: {_reason(error, folder, key)}") from None
    finally:
        for made_here in reversed(made):
            with suppress(OSError):  # another process of the run has put something there
                made_here.rmdir()


def _reason(error: OSError, folder: Path, key: str) -> str:
    if error.errno == errno.ENAMETOOLONG:
        longest = max(len(os.fsencode(part)) for part in folder.parts)
        return f"a name of {longest} bytes is too long for this disk; shorten {key}"
    return f"{folder} cannot be written ({error.strerror}); choose another {key}"
