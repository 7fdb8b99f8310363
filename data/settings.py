"""What a corpus is made of and how it is tokenised: the settings, and the check that finds all that is wrong."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import c4
from data.shards import sha256
from data.sources import SourceFile, stdlib_files, text_files
from data.tokenizer import Tokenizer

SOURCES = ("stdlib", "text", "instructions", "c4")
FORMAT = 2  # of the folder; also to be raised when the same settings would give other tokens


@dataclass(kw_only=True)
class DataSettings:
    """What to train on, and how it is tokenised and split."""

    name: str = "stdlib"
    """First part of the prepared folder's name."""
    source: str = "stdlib"
    """`stdlib`: the source of Python's standard library; `text`, `instructions`, `c4`: the files under `paths`."""
    paths: list[str] = field(default_factory=list)
    """Files, folders and globs."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """The file names taken from folders."""
    max_bytes: int = 30_000_000
    """Files that would exceed this are left out, tests first."""
    tokenizer: str | None = None
    """A sentencepiece model to use; none: one is trained on the training split."""
    vocab_size: int = 4096
    """Of the tokenizer to train, or as the one brought has it."""
    validation_share: float = 0.05
    """Share of the documents that is held out."""
    root: str = "prepared"
    """Folder of all preparations."""
    seed: int = 0
    """Chooses the documents held out and the sample a tokenizer is trained on."""


def problems(settings: DataSettings) -> list[str]:
    """Everything wrong with the settings that shows without reading the corpus, a line each."""
    return examine(settings)[1]


def examine(settings: DataSettings) -> tuple[list[SourceFile], list[str]]:
    s, files = settings, list[SourceFile]()
    checks = [
        (re.fullmatch(r"\w[\w.-]*", s.name), f"data.name: {s.name!r} cannot begin a folder's name"),
        (s.vocab_size > 0, f"data.vocab_size: {s.vocab_size} must be positive"),
        (0 < s.validation_share < 1, f"data.validation_share: {s.validation_share} must lie between 0 and 1"),
        (s.source in SOURCES, f"data.source: {s.source!r} is not known; use {', '.join(SOURCES)}"),
    ]
    found = [message for holds, message in checks if not holds]
    try:
        if s.source == "stdlib":
            files = stdlib_files(s.max_bytes)
        elif s.source in SOURCES:
            files = text_files(s.paths, s.patterns, s.max_bytes)
        found += c4.problems(files) if s.source == "c4" else []
    except ValueError as error:
        found += str(error).splitlines()
        found += [f"data.source: c4: {c4.HINT}"] if s.source == "c4" else []
    if s.tokenizer is not None:
        found += _tokenizer_problems(s.tokenizer, s.vocab_size)
    return files, found


def _tokenizer_problems(path: str, vocab_size: int) -> list[str]:
    if not Path(path).is_file():
        return [f"data.tokenizer: there is no file {path}; name a sentencepiece .model or null to train one"]
    try:
        actual = Tokenizer(path).vocab_size
    except ValueError as error:
        return [f"data.tokenizer: {error}"]
    if actual != vocab_size:
        return [f"data.vocab_size: is {vocab_size}, but {path} has {actual} tokens; set it to {actual}"]
    return []


def identity(settings: DataSettings) -> dict[str, Any]:
    """What, besides the text, decides which tokens come out."""
    return {
        "format": FORMAT,
        "source": settings.source,
        "tokenizer": settings.tokenizer and sha256(Path(settings.tokenizer)),
        "vocab_size": settings.vocab_size,
        "validation_share": settings.validation_share,
        "seed": settings.seed,
    }
