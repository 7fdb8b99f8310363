"""The files of a corpus: named, found and limited in size."""

import functools
import glob
import hashlib
import logging
import os
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data.sources.file_search import AGAIN, BROKEN, ODD_NAME, FileSearch, Remarks, file_problem, readable, shorten
from data.wording import counted

logger = logging.getLogger(__name__)

TEST_FOLDERS = {"test", "tests", "idle_test"}


class SourceFile(NamedTuple):
    """A file of the corpus: its name in the corpus, path, size in bytes and modification time in ns.

    A `held_out` file is for validation.
    """

    name: str
    path: Path
    size: int
    mtime: int
    held_out: bool = False


def stdlib_files(max_bytes: int) -> list[SourceFile]:
    """The source files of the running Python's standard library, without installed packages, in order of name.

    Raises:
        ValueError: There are none, or none fits into `max_bytes`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [_source_file(path, root) for path in FileSearch(["*.py"], Remarks()).files_in(root)]
    if not files:
        raise ValueError(f"data.source: {root} has no .py file; train on your own text instead (data=text)")
    return _within(files, max_bytes)


def text_files(
    paths: Iterable[str], patterns: Iterable[str], max_bytes: int, key: str = "data.paths"
) -> list[SourceFile]:
    """The files at `paths`, each file once, in order of name.

    The name of a file begins with the last part of the given path, or for a glob, of the path before the first
    wildcard. For example, the file `/a/b/c/d.txt` is named `d.txt` if it is given directly, and `b/c/d.txt` if `/a/b`
    or `/a/b/*/*.txt` is given. One line of the log counts and names the paths that are left out.

    Args:
        paths: Files, folders and globs.
        patterns: Globs for the names of files to take from folders.
        max_bytes: Limit for the sum of the files' sizes. If it is exceeded, files in test folders are left out first,
            then others by a hash of their names.
        key: The setting with the paths, for messages.

    Raises:
        ValueError: Some paths lead to no file (one line for each), there are no paths, or no file fits.
    """
    patterns, remarks, found, problems = list(patterns), Remarks(), dict[Path, SourceFile](), list[str]()
    search = FileSearch(patterns, remarks)
    for entry in paths:
        path = Path(os.path.abspath(os.path.expanduser(entry)))
        is_glob = glob.has_magic(entry) and not os.path.lexists(path)
        if problem := "" if is_glob else _problem(path, readable(entry)):
            problems.append(f"{key}: {problem}; check {key}")
            continue
        matches = search.expand(path) if is_glob else [path]
        files = [file for match in matches for file in _files_at(match, search, remarks)]
        if not matches:
            problems.append(f"{key}: no file matches {readable(entry)}; check {key}")
        elif not files:
            patterns_key = "--patterns" if key.startswith("--") else "data.patterns"
            wanted = ", ".join(patterns) or f"nothing ({patterns_key} is empty)"
            wanted, also = ("", "") if patterns == ["*"] else (f"{wanted} ", f" or {patterns_key}")
            problems.append(f"{key}: {readable(entry)} contains no {wanted}file; check {key}{also}")
        _take(files, _root(path, is_glob), found, remarks)
    _log_once(f"{key}: {remarks}" if str(remarks) else "")
    if problems:
        raise ValueError("\n".join(problems))
    if not found:
        raise ValueError(f"{key}: is empty; name the files, folders or globs to train on")
    return _within(list(found.values()), max_bytes)


def with_held_out(files: list[SourceFile], own: list[SourceFile]) -> list[SourceFile]:
    """Combine ``files`` (training) with ``own`` (the separate validation files), which are marked as held out.

    A file in both lists is used only for validation.
    """
    places = {file.path.resolve() for file in own}
    kept = [file for file in files if file.path.resolve() not in places]
    if len(kept) < len(files):
        both, count = sorted({file.name for file in files} - {file.name for file in kept}), len(files) - len(kept)
        shared = f"{counted(count, 'file')} of data.paths {'is' if count == 1 else 'are'}"
        _log_once(f"data.validation_paths: {shared} used only for validation ({shorten(both)})")
    return kept + [file._replace(held_out=True) for file in own]


def _problem(path: Path, name: str) -> str:
    """Why a path (not a glob) cannot be read, with its `name`; empty if it can be read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        target = readable(os.readlink(path)) if path.is_symlink() else ""
        return f"{name} is a link to {target}, which does not exist" if target else f"there is no file or folder {name}"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f"{name} is a socket, pipe or device, not a file"


def _files_at(path: Path, search: FileSearch, remarks: Remarks) -> list[Path]:
    if path.is_dir():
        return search.files_in(path)
    if problem := file_problem(path):
        remarks.add(problem, path)
    return [] if problem else [path]


def _take(paths: list[Path], root: Path, found: dict[Path, SourceFile], remarks: Remarks) -> None:
    """Add the files at `paths` to `found`, whose keys are the paths with all links resolved."""
    for path in paths:
        try:
            file, place = _source_file(path, root.parent), path.resolve()
        except OSError:
            remarks.add(BROKEN, path)  # it was deleted after the search found it
            continue
        if place in found and found[place].path != path:
            remarks.add(AGAIN, path)
        if found.setdefault(place, file) is file and file.name != path.relative_to(root.parent).as_posix():
            remarks.add(ODD_NAME, path)


@functools.cache
def _log_once(message: str) -> None:
    if message:
        logger.info("%s", message)


def _root(path: Path, is_glob: bool) -> Path:
    """The folder or file with which names begin: the path itself, or for a glob the last folder before a wildcard."""
    while is_glob and glob.has_magic(str(path)):
        path = path.parent
    return path


def _source_file(path: Path, root: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(readable(path.relative_to(root).as_posix()), path, status.st_size, status.st_mtime_ns)


def size_and_time(path: str | Path) -> tuple[int, int] | None:
    """The size in bytes and the modification time in ns of the file at `path`; None if it cannot be read."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _within(files: list[SourceFile], max_bytes: int) -> list[SourceFile]:
    """The files that fit into `max_bytes`, in order of name.

    Files in test folders are left out first, then files by the hash of their names: so the sample favours no part of
    the alphabet and hardly changes when a file is added.

    Raises:
        ValueError: No file with any text fits.
    """

    def priority(file: SourceFile) -> tuple[bool, bytes]:
        in_tests = not TEST_FOLDERS.isdisjoint(file.name.split("/"))
        return in_tests, hashlib.sha256(file.name.encode()).digest()

    kept, left_out, room = list[SourceFile](), list[SourceFile](), max_bytes
    for file in sorted(files, key=priority):
        if file.size <= room:
            kept.append(file)
            room -= file.size
        else:
            left_out.append(file)
    if any(file.size for file in files) and not any(file.size for file in kept):
        smallest = min(file.size for file in files if file.size)
        raise ValueError(
            f"data.max_bytes={max_bytes} is smaller than every file with text; raise it to at least {smallest}"
        )
    if left_out:
        size, names = sum(file.size for file in left_out) / 1e6, shorten(sorted(file.name for file in left_out))
        _log_once(
            f"left out {len(left_out)} of {len(files)} files ({size:.1f} MB: {names}) to stay within "
            f"data.max_bytes={max_bytes}"
        )
    return sorted(kept)
