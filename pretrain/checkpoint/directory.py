"""The checkpoints of a run on the disk: which of them are good, which is the newest, which go.

    checkpoints/step-00000200/   tensors in safetensors files, written by pretrain.checkpoint
                 state.json      format, step, tokens, what the data and the settings were
                 manifest.json   size and SHA-256 of each file
                latest           a link to the newest one, for people and other programs

Here nobody follows ``latest``: what counts is that the files are those of the manifest. A link to what is gone tells
that somebody took checkpoints away.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data.atomic import UNFINISHED, fsync, sha256, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 2
WITHOUT_MANIFEST = 1  # the format before, which had no checksums
STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
DAMAGED = ".damaged"
HALF_WAY = "half_way"  # an empty file in a checkpoint of half an interval, which is there until a newer one is
OF_A_RUN: dict[str, Any] = {"step": int, "seconds": (int, float), "training_seconds": (int, float), "data": dict}


class Damaged(ValueError):
    """A checkpoint whose files are not what was written."""

    def __init__(self, path: Path, what: object):
        self.path, self.what = path, str(what)
        super().__init__(f"{path} is damaged ({what}); move it away to go on from the checkpoint before it")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def all_of(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, good or damaged, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below ``folder``; whether it is good, ``verify`` tells."""
    return next(iter(all_of(folder)), None)


def newest_to_read(folder: Path) -> Path | None:
    """``latest`` for who does not keep the run from going on: one that is not taken away meanwhile, if there is any."""
    return next((path for path in all_of(folder) if not is_half_way(path)), latest(folder))


def newest_good(folder: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint that is what was written, and what is wrong with those after it; None for a new run.

    Raises:
        ValueError: there are, or were, checkpoints, and none of them is good.
    """
    damaged: list[Damaged] = []
    for path in all_of(folder):
        try:
            verify(path)
            return path, damaged
        except Damaged as error:
            damaged.append(error)
    mend = "bring a good one back from a copy, or move {} away to begin the run anew"
    if damaged:
        lines = [f"{error.path} is damaged ({error.what})" for error in damaged]
        raise ValueError("\n".join(["no checkpoint of this run is good:", *lines, mend.format(folder)]))
    if (folder / LATEST).is_symlink():
        gone = (folder / LATEST).readlink()
        raise ValueError(f"{folder} held {gone}, which is gone; {mend.format(folder / LATEST)}")
    return None, []


def set_aside(damaged: Damaged) -> Path:
    """Move a damaged checkpoint out of the way of the run, under a name of its own."""
    number, aside = 1, damaged.path.with_suffix(DAMAGED)
    while aside.exists():
        number += 1
        aside = damaged.path.with_suffix(f"{DAMAGED}-{number}")
    return damaged.path.rename(aside)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half written, or half removed."""
    for path in folder.glob(f"*{UNFINISHED}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of the checkpoint at ``path``.

    Raises:
        ValueError: a damaged file, or a format that this version does not read.
    """
    state = _read_json(path, STATE)
    if lacking := [key for key, kind in OF_A_RUN.items() if not isinstance(state.get(key), kind)]:
        raise Damaged(path, f"{STATE} does not tell {lacking[0]}")
    return state


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}"
        raise Damaged(path, reason) from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise Damaged(path, f"{name} has no format")
    if not WITHOUT_MANIFEST <= content["format"] <= FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {content['format']}; this version reads formats {WITHOUT_MANIFEST} to "
            f"{FORMAT}: use the version that wrote it, or move it away"
        )
    return content


def seal(path: Path, state: dict[str, Any], checksums: dict[str, tuple[int, str]]) -> None:
    """Write ``state`` and the manifest to ``path``, the last files of a checkpoint.

    Args:
        state: JSON-able, and by HALF_WAY whether it is of half an interval.
        checksums: of each file there already, as ``checksum`` has it.
    """
    if state.get(HALF_WAY):
        (path / HALF_WAY).touch()
    state = {key: value for key, value in state.items() if key != HALF_WAY}
    write_atomic(path / STATE, json.dumps({"format": FORMAT, **state}, indent=1))
    checksums = {**checksums, STATE: checksum(path / STATE)}
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(checksums.items())}
    write_atomic(path / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
    fsync(path)


def checksum(file: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    return file.stat().st_size, sha256(file)


def verify(path: Path) -> None:
    """Hold the files of a checkpoint against its manifest.

    Raises:
        Damaged: a file is missing, too many, of another size or with other content.
        ValueError: a format that this version does not read.
    """
    if not (path / MANIFEST).exists() and read_state(path)["format"] == WITHOUT_MANIFEST:
        return _verify_lengths(path)
    files = _read_json(path, MANIFEST).get("files")
    if not isinstance(files, dict):
        raise Damaged(path, f"{MANIFEST} lists no files")
    try:
        there = {file.name for file in path.iterdir()} - {MANIFEST, HALF_WAY}
        if unlike := sorted(there ^ files.keys()):
            raise Damaged(path, f"{unlike[0]} is {'too much' if unlike[0] in there else 'missing'}")
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if not isinstance(expected, dict) or size != expected.get("bytes"):
                raise Damaged(path, f"{name} has {size} bytes, which is not what {MANIFEST} says")
            if sha256(path / name) != expected.get("sha256"):
                raise Damaged(path, f"the content of {name} is not what was written")
    except OSError as error:
        raise Damaged(path, error) from None
    _read_json(path, STATE)


def _verify_lengths(path: Path) -> None:
    """What can be told of a checkpoint without a manifest: that its tensors' files are as long as they say."""
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise Damaged(path, f"{file.name}: {error}") from None
    if not files:
        raise Damaged(path, "there are no tensors")


def point_at(path: Path) -> None:
    """Let ``latest`` be ``path``."""
    link = path.parent / (LATEST + UNFINISHED)
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(path.name)
        link.replace(path.parent / LATEST)
    except OSError as error:  # there are file systems without links, and nothing here needs this one
        logger.warning("%s could not be pointed at %s: %s", path.parent / LATEST, path.name, error)


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove what a newer checkpoint makes needless: those of half an interval, but for the newest, and of the others
    those that are neither among the newest ``keep_last`` nor of a multiple of ``keep_every``.

    ``keep_last=0`` keeps all others; what is set aside as damaged is never removed.
    """
    newest, *before = all_of(folder)
    go = [path for path in before if is_half_way(path)]
    if keep_last:
        others = [path for path in before if path not in go]
        others = others[keep_last if is_half_way(newest) else keep_last - 1 :]
        go += [p for p in others if keep_every == 0 or int(p.name.removeprefix("step-")) % keep_every]
    for path in go:
        shutil.rmtree(path.rename(path.with_suffix(UNFINISHED)))


def is_half_way(path: Path) -> bool:
    return (path / HALF_WAY).exists()


def keep(path: Path) -> None:
    """Let a checkpoint of half an interval be one that stays: of a signal, of the end, of an interval that changed."""
    if is_half_way(path):
        (path / HALF_WAY).unlink()
        fsync(path)
