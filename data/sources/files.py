"""C4 as allenai publishes it: gzipped files of JSON lines, whose names say which split they belong to."""

import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

TRAIN, VALIDATION = "c4-train.", "c4-validation."  # how the names of its files begin
C4_HINT = (
    "huggingface.co/datasets/allenai/c4 has them in its folder en/ (git lfs pull --include 'en/c4-train.0000*,"
    "en/c4-validation.*'); data.paths names that folder"
)


class SourceFile(NamedTuple):
    """A file of the corpus: its name in the corpus, where it lies, its size in bytes and its time in ns.

    What is `held_out` is for validation.
    """

    name: str
    path: Path
    size: int
    mtime: int
    held_out: bool = False


def c4_by_split(files: list[SourceFile]) -> list[SourceFile]:
    """The files, those of C4's validation split held out."""
    return [file._replace(held_out=file.name.rpartition("/")[2].startswith(VALIDATION)) for file in files]


def c4_problems(files: list[SourceFile]) -> list[str]:
    """What is missing among the files of ``by_split``; a message each."""
    splits = {file.held_out for file in files}
    wanted = {False: TRAIN, True: VALIDATION}
    missing = [f"{begin}*.json.gz" for held_out, begin in wanted.items() if held_out not in splits]
    return [f"data.paths: there is no {' and no '.join(missing)}: {C4_HINT}"] if missing else []


logger = logging.getLogger(__name__)

EXCLUDED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
TEST_FOLDERS = {"test", "tests", "idle_test"}


def stdlib_files(max_bytes: int) -> list[SourceFile]:
    """The source of the running Python's standard library, without installed packages, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [_source_file(path, root) for path in _walk(root, ["*.py"], hidden=[])]
    if not files:
        raise ValueError(f"data.source: {root} holds no .py file; train on your own text instead (data=text)")
    return _within(files, max_bytes)


def text_files(
    paths: Iterable[str], patterns: Iterable[str], max_bytes: int, key: str = "data.paths"
) -> list[SourceFile]:
    """Files, folders (searched for `patterns`) and globs, each file once, in order of name.

    A file is named by its path from the parent of the folder it was found under.
    Raises ValueError with one line for every path that leads to nothing.
    """
    patterns, found, problems, hidden = list(patterns), dict[Path, SourceFile](), list[str](), list[str]()
    for entry in paths:
        matches, root = _matches(entry)
        files = [f for m in matches for f in (_walk(m, patterns, hidden) if m.is_dir() else [m])]
        if not matches:
            kind = "no file matches" if glob.has_magic(entry) else "there is no file or folder"
            problems.append(f"{key}: {kind} {entry}; check {key}")
        elif not files:
            wanted = ", ".join(patterns) or "nothing (data.patterns is empty)"
            problems.append(f"{key}: {entry} holds no {wanted} file; check {key} or data.patterns")
        for path in files:
            found.setdefault(path.resolve(), _source_file(path, root.parent))
    if problems:
        raise ValueError("\n".join(problems))
    if not found:
        raise ValueError(f"{key}: is empty; name the files, folders or globs to train on")
    if hidden:
        logger.info("left out %d hidden folders: %s", len(hidden), shorten(hidden))
    return _within(list(found.values()), max_bytes)


def shorten(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _walk(folder: Path, patterns: list[str], hidden: list[str]) -> list[Path]:
    """Files below `folder` whose name matches a pattern; hidden folders are left out and noted."""

    def report(error: OSError) -> None:
        logger.warning("left out %s: %s", error.filename, error.strerror)

    found = []
    for where, folders, names in os.walk(folder, onerror=report):
        hidden += [os.path.join(where, name) for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS and name[0] != "."]
        found += [Path(where, name) for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    return [path for path in found if path.is_file()]


def _matches(entry: str) -> tuple[list[Path], Path]:
    """What a path or glob leads to, and the folder or file its search starts from (for the names)."""
    path = Path(os.path.abspath(os.path.expanduser(entry)))
    if path.exists() or not glob.has_magic(entry):
        return ([path] if path.exists() else []), path
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    return [Path(match) for match in glob.glob(str(path), recursive=True)], root


def _source_file(path: Path, root: Path) -> SourceFile:
    stat = path.stat()
    name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")
    return SourceFile(name, path, stat.st_size, stat.st_mtime_ns)


def _within(files: list[SourceFile], max_bytes: int) -> list[SourceFile]:
    """The files that fit into `max_bytes`, in order of name.

    Tests give way first, so that a library is kept before its tests; beyond that the choice goes by the
    hash of the name, a sample that favours no part of the alphabet and hardly moves when a file is added.
    Raises ValueError if none with any text fits.
    """

    def priority(file: SourceFile) -> tuple[bool, bytes]:
        in_tests = not TEST_FOLDERS.isdisjoint(file.name.split("/"))
        return in_tests, hashlib.sha256(file.name.encode()).digest()

    kept, room = [], max_bytes
    for file in sorted(files, key=priority):
        if file.size <= room:
            kept.append(file)
            room -= file.size
    if any(file.size for file in files) and not any(file.size for file in kept):
        raise ValueError(f"data.max_bytes: {max_bytes} leaves no text of {len(files)} files; allow more")
    if len(kept) < len(files):
        left_out = (sum(file.size for file in files) - (max_bytes - room)) / 1e6
        logger.info(
            "left out %d of %d files (%.1f MB) to stay within data.max_bytes=%d",
            *(len(files) - len(kept), len(files), left_out, max_bytes),
        )
    return sorted(kept)
