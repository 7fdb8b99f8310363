"""Checks of data settings that do not read the corpus."""

import math
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from data.settings import DTYPES, SOURCES, DataSettings
from data.sources.c4 import C4_HINT, c4_by_split, c4_problems
from data.sources.files import SourceFile, stdlib_files, text_files, with_held_out
from data.tokenizer import MOST_PADDING, Tokenizer

PART_KEYS = {
    "name", "source", "paths", "patterns", "max_bytes", "validation_paths", "column", "dataset", "dataset_name",
    "dataset_split", "dataset_revision", "streaming", "validation_share", "token_dtype",
}  # fmt: skip
LONGEST_ADDITION = len(".-0123456789abcdef.tmp")  # the longest that a preparation's folders add to data.name


def examine(settings: DataSettings) -> tuple[list[SourceFile], list[str]]:
    """List the files of the corpus, and check the settings.

    Reads names, sizes and times of files, and the tokenizer, but no text. For a mixture, checks only the settings that
    its corpora share; `mixture_parts` returns those of each corpus.

    Returns:
        The files (none for a mixture or a dataset on the hub), and one message per problem of the settings.
    """
    found = _value_problems(settings)
    if settings.source == "mixture":
        return [], found
    files = list[SourceFile]()
    try:
        files = _files(settings)
        found += c4_problems(files) if settings.source == "c4" else []
    except ValueError as error:
        found += str(error).splitlines()
        found += [f"data.source=c4: {C4_HINT}"] if settings.source == "c4" else []
    if settings.tokenizer is not None:
        found += _tokenizer_problems(settings)
    return files, found


def _value_problems(s: DataSettings) -> list[str]:
    checks = [
        (
            re.fullmatch(r"\w[\w.-]*", s.name),
            f"data.name: {s.name!r} cannot begin a folder name; use letters, digits, _, . and -",
        ),
        (s.vocab_size > 0, f"data.vocab_size: {s.vocab_size} must be positive"),
        (0 < s.validation_share < 1, f"data.validation_share: {s.validation_share} must be between 0 and 1"),
        (s.shard_tokens > 0, f"data.shard_tokens: {s.shard_tokens} must be positive"),
        (s.workers is None or s.workers > 0, f"data.workers: {s.workers} must be positive, or null for all cores"),
        (s.source in SOURCES, f"data.source: {s.source!r} is unknown; use {', '.join(SOURCES)}"),
        (
            s.source != "tokens" or s.tokenizer,
            "data.tokenizer: is not set; name the tokenizer that made the tokens of data.paths",
        ),
        (s.token_dtype in DTYPES, f"data.token_dtype: {s.token_dtype} is unknown; use {', '.join(DTYPES)}"),
        (
            bool(s.mixture) == (s.source == "mixture"),
            "data.mixture: must be set with data.source=mixture, and only then",
        ),
        (
            (s.dataset is None) == (s.source != "datasets"),
            "data.dataset: must be set with data.source=datasets, and only then",
        ),
        (
            not s.validation_paths or s.source in ("text", "records", "instructions"),
            f"data.validation_paths: not supported by data.source={s.source}; leave it empty",
        ),
    ]
    return [message for holds, message in checks if not holds]


def mixture_parts(settings: DataSettings) -> list[tuple[DataSettings, float]]:
    """The settings and the weight of each corpus of a mixture.

    What an entry of `settings.mixture` does not set is as in `settings`, but the source is `text`.

    Raises:
        ValueError: `data.mixture` or `data.tokenizer` is wrong; one line per problem.
    """
    common = {f.name: getattr(settings, f.name) for f in fields(DataSettings)} | {"mixture": [], "source": "text"}
    parts, found = [], []
    for number, part in enumerate(settings.mixture):
        own = dict(part) if isinstance(part, dict) else {}
        weight = own.pop("weight", None)
        own.setdefault("name", f"{settings.name}-{number}")
        unknown = set(own) - PART_KEYS
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            found.append(f"data.mixture[{number}]: needs a weight above 0")
        elif unknown:
            found.append(
                f"data.mixture[{number}]: {', '.join(sorted(unknown))} cannot be set for one corpus; remove it"
            )
        elif own.get("source") in ("instructions", "mixture"):
            found.append(f"data.mixture[{number}]: source {own['source']} cannot be mixed; choose another")
        else:
            parts.append((DataSettings(**{**common, **own}), float(weight)))
    if len(parts) + len(found) < 2:
        found.append(
            "data.mixture: needs at least two corpora, such as [{weight: 3, paths: [a]}, {weight: 1, paths: [b]}]"
        )
    if len({part.name for part, _ in parts}) < len(parts):
        found.append("data.mixture: two corpora have the same name; change one")
    if settings.tokenizer is None:
        found.append("data.tokenizer: a mixture needs a tokenizer; train one with python -m data.train_tokenizer")
    if found:
        raise ValueError("\n".join(found))
    return parts


def folder_problems(settings: DataSettings) -> list[str]:
    """One message per reason why the folders of a preparation cannot be created; empty if there is none.

    Creates and removes a temporary folder, because permission bits do not show every obstacle to writing.
    """
    root = Path(settings.root)
    there = next((path for path in (root, *root.parents) if os.path.lexists(path)), Path("."))
    try:
        longest = os.pathconf(there, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = 255
    found = []
    if (size := len(os.fsencode(settings.name)) + LONGEST_ADDITION) > longest:
        found.append(
            f"data.name: {settings.name[:32]}… gives a folder name of {size} bytes, but {there} allows {longest}; "
            f"shorten data.name by at least {size - longest} bytes"
        )
    if not there.is_dir():
        kind = "a file, not a folder" if there.exists() else "a broken link"
        return [*found, f"data.root: {there} is {kind}; choose another folder"]
    try:
        if too_long := next((part for part in root.parts if len(os.fsencode(part)) > longest), None):
            raise OSError(0, f"the name {too_long[:32]}… is longer than {longest} bytes")
        with suppress(FileNotFoundError):  # an impossible path raises another error
            os.lstat(root / "a")
        with tempfile.TemporaryDirectory(prefix=".write-test-", dir=there):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        found.append(f"data.root: cannot write to {str(root)[:200]} ({reason}); choose another folder")
    return found


def _files(s: DataSettings) -> list[SourceFile]:
    if s.source == "stdlib":
        return stdlib_files(s.max_bytes)
    if s.source == "datasets":
        local = s.dataset and Path(s.dataset).exists()
        return text_files([str(s.dataset)], ["*"], 2**63, key="data.dataset") if local else []
    if s.source not in SOURCES:
        return []
    files = text_files(s.paths, s.patterns, s.max_bytes)
    if s.source == "c4":
        return c4_by_split(files)
    if s.validation_paths:
        return with_held_out(files, text_files(s.validation_paths, s.patterns, 2**63, key="data.validation_paths"))
    return files


def _tokenizer_problems(s: DataSettings) -> list[str]:
    path = str(s.tokenizer)
    if not Path(path).is_file():
        return [f"data.tokenizer: there is no file {path}; name a .model or tokenizer.json, or null to train one"]
    try:
        tokenizer = Tokenizer(path, s.bos, s.eos)
    except ValueError as error:
        return [str(error) if str(error).startswith("data.") else f"data.tokenizer: {error}"]
    actual = tokenizer.vocab_size
    if s.vocab_size - MOST_PADDING <= actual and tokenizer.fits(s.vocab_size):
        return []
    return [f"data.vocab_size: is {s.vocab_size}, but {path} has {actual} tokens; set it to {actual}"]
