"""The checkpoints of a run on disk: write their last files, verify them, find the newest, and remove folders.

    checkpoints/step-00000200/   *.safetensors   tensors, written by pretrain.checkpoint.saver
                                 state.json      format, step, tokens, data, counters (pretrain.training.state)
                                 manifest.json   size and SHA-256 of each of these files
                latest           a link to the newest checkpoint, for people and other programs

A run does not use ``latest`` to resume: it looks for the newest intact checkpoint. A checkpoint is intact if every
file in its manifest has the size and checksum given there; other files are ignored. If ``latest`` names a missing
checkpoint, checkpoints were removed by hand.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from data.atomic import UNFINISHED, fsync, sha256, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 2
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
DAMAGED = ".damaged"
REQUIRED: dict[str, Any] = {"step": int, "seconds": (int, float), "training_seconds": (int, float), "data": dict}


class Damaged(ValueError):
    """A checkpoint with missing or changed files. ``what`` names the file and the problem."""

    def __init__(self, path: Path, what: object):
        self.path, self.what = path, str(what)
        super().__init__(f"{path} is damaged ({what}); move it away to use the previous checkpoint")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.what)  # sent from the main process to the others


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, intact or damaged, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, intact or damaged; None if there is none."""
    return next(iter(checkpoints_in(folder)), None)


def newest_good(folder: Path) -> tuple[Path | None, list[Damaged]]:
    """Return the newest intact checkpoint (None for a new run), and the errors of newer, damaged checkpoints.

    Raises:
        ValueError: there are, or were, checkpoints, but none of them is intact; or the newest one that is not damaged
            has a format that this version does not read.
    """
    damaged: list[Damaged] = []
    for path in checkpoints_in(folder):
        try:
            verify(path)
            return path, damaged
        except Damaged as error:
            damaged.append(error)
    fix = "restore one from a backup, or move {} away to start the run from the beginning"
    if damaged:
        lines = [f"{error.path} is damaged ({error.what})" for error in damaged]
        raise ValueError("\n".join(["no checkpoint of this run is intact:", *lines, fix.format(folder)]))
    if (folder / LATEST).is_symlink():
        gone = (folder / LATEST).readlink()
        raise ValueError(f"{folder} had the checkpoint {gone}, which is missing; {fix.format(folder / LATEST)}")
    return None, []


def set_aside(damaged: Damaged) -> Path:
    """Rename a damaged checkpoint to an unused name; returns the new path."""
    number, aside = 1, damaged.path.with_suffix(DAMAGED)
    while aside.exists():
        number += 1
        aside = damaged.path.with_suffix(f"{DAMAGED}-{number}")
    return damaged.path.rename(aside)


def remove_unfinished(folder: Path, *patterns: str) -> None:
    """Remove files and folders that a killed process left half-written or half-removed.

    Args:
        patterns: globs of their names without the suffix ``.tmp``; other files are kept.
    """
    for path in (path for pattern in patterns for path in folder.glob(pattern + UNFINISHED)):
        remove(path)


def read_state(path: Path) -> dict[str, Any]:
    """The content of ``state.json`` of the checkpoint at ``path``.

    Raises:
        ValueError: the file is damaged (``Damaged``), or has a format that this version does not read.
    """
    state = _read_json(path, STATE)
    if lacking := [key for key, kind in REQUIRED.items() if not isinstance(state.get(key), kind)]:
        raise Damaged(path, f"{STATE} has no valid {lacking[0]}")
    return state


def read_manifest(path: Path) -> dict[str, Any]:
    """The files of the checkpoint at ``path``, by name: ``{"bytes": size, "sha256": hex digits}``.

    Raises:
        ValueError: the manifest is damaged (``Damaged``), or has a format that this version does not read.
    """
    files = _read_json(path, MANIFEST).get("files")
    if not isinstance(files, dict):
        raise Damaged(path, f"{MANIFEST} lists no files")
    return files


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}"
        raise Damaged(path, reason) from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise Damaged(path, f"{name} has no format")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {content['format']}; this version reads format {FORMAT}; use the version "
            "that wrote the checkpoint, or move it away"
        )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Equal keys are an error: a flipped bit can make two keys equal."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def seal(path: Path, state: dict[str, Any], checksums: dict[str, tuple[int, str]]) -> None:
    """Complete the checkpoint in the folder ``path``: write ``state.json`` and the manifest.

    Args:
        state: the content of ``state.json`` except its format; JSON-serialisable.
        checksums: for each file that is already there, by name, its ``checksum``.
    """
    write_atomic(path / STATE, json.dumps({"format": FORMAT, **state}, indent=1))
    checksums = {**checksums, STATE: checksum(path / STATE)}
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(checksums.items())}
    write_atomic(path / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    fsync(path)


def checksum(file: Path) -> tuple[int, str]:
    """The size of a file in bytes, and its SHA-256 as 64 hex digits."""
    return file.stat().st_size, sha256(file)


def verify(path: Path) -> None:
    """Compare the files of a checkpoint with its manifest. Files that are not in the manifest are ignored.

    Raises:
        Damaged: a file is missing, or its size or content differs.
        ValueError: a format that this version does not read.
    """
    files = read_manifest(path)
    if STATE not in files or len(files) < 2:
        raise Damaged(path, f"{MANIFEST} does not name {STATE} and files with tensors")
    try:
        for name, expected in files.items():
            if not (path / name).exists():
                raise Damaged(path, f"{name} is missing")
            size = (path / name).stat().st_size
            if not isinstance(expected, dict) or size != expected.get("bytes"):
                raise Damaged(path, f"{name} has {size} bytes, unlike in {MANIFEST}")
            if sha256(path / name) != expected.get("sha256"):
                raise Damaged(path, f"the content of {name} has changed")
    except (OSError, ValueError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(path, error) from None
    _read_json(path, STATE)


def point_at(path: Path) -> None:
    """Make ``latest`` a link to the checkpoint at ``path``. If this fails, only log a warning."""
    link = path.parent / (LATEST + UNFINISHED)
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(path.name)
        link.replace(path.parent / LATEST)
    except OSError as error:  # some file systems have no links, and resuming does not need this link
        logger.warning(
            "the link %s to %s could not be made (%s), but resuming works", path.parent / LATEST, path.name, error
        )


def remove(path: Path) -> None:
    """Delete a file or folder. If this fails, for example because NFS keeps a file open, only log a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s could not be removed (%s); delete it by hand", path, error)
