"""What a corpus is made of and how it is tokenised: the settings, and the check that finds all that is wrong."""

import ast
import inspect
import math
import re
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from data import c4
from data.shards import sha256
from data.sources import SourceFile, stdlib_files, text_files
from data.tokenizer import Tokenizer

LINES = ("records", "instructions", "c4")  # of JSON, or rows of Parquet
SOURCES = ("stdlib", "text", *LINES, "tokens", "datasets", "mixture")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")  # of token files
PART_KEYS = {
    "name", "source", "paths", "patterns", "max_bytes", "validation_paths", "column", "dataset", "dataset_name",
    "dataset_split", "dataset_revision", "streaming", "validation_share", "token_dtype",
}  # fmt: skip
FORMAT = 2  # of the folder; also to be raised when the same settings would give other tokens


@dataclass(kw_only=True)
class DataSettings:
    """What to train on, and how it is tokenised and split."""

    name: str = "stdlib"
    """First part of the prepared folder's name."""
    source: str = "stdlib"
    """`stdlib`: the source of Python's standard library; `text`, `records` (Parquet and JSON lines, also .gz, .zst),
    `instructions`, `c4`: the files under `paths`; `datasets`: `dataset`, by Hugging Face's library;
    `tokens`: what another program tokenised; `mixture`: several of these.
    """
    paths: list[str] = field(default_factory=list)
    """Files, folders and globs."""
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.py"])
    """The file names taken from folders."""
    max_bytes: int = 30_000_000
    """Files that would exceed this are left out, tests first."""
    validation_paths: list[str] = field(default_factory=list)
    """Files of their own to hold out, instead of a share; what they hold is left out of training."""
    column: str = "text"
    """Of JSON lines, Parquet and datasets: which one is the text."""
    token_dtype: str = "uint16"
    """Of source `tokens`: of files that are no .npy."""
    dataset: str | None = None
    """Of source `datasets`: a name on the hub, or a folder."""
    dataset_name: str | None = None
    """Which of the dataset's configurations."""
    dataset_split: str = "train"
    """Which of the dataset's parts."""
    dataset_revision: str | None = None
    """A commit of the hub's."""
    streaming: bool = True
    """Read the dataset as it comes, without a copy of it on this machine."""
    mixture: list[Any] = field(default_factory=list)
    """Of source `mixture`: for each corpus its weight, and the settings in which it differs from these."""
    tokenizer: str | None = None
    """A sentencepiece model or a tokenizer.json to use; none: one is trained on the training split."""
    bos: str | None = None
    """The token that begins a document, when the tokenizer's file does not tell."""
    eos: str | None = None
    """The token that ends a document, when the tokenizer's file does not tell."""
    vocab_size: int = 4096
    """Of the tokenizer to train, or as the one brought has it."""
    validation_share: float = 0.05
    """Share of the documents that is held out."""
    root: str = "prepared"
    """Folder of all preparations."""
    seed: int = 0
    """Chooses the documents held out and the sample a tokenizer is trained on."""
    shard_tokens: int = 2**28
    """Tokens in a shard of the preparation; one more begins behind the document that reaches them."""
    workers: int | None = None
    """Processes that tokenise; none: as many as there are cores."""


def meanings() -> dict[str, str]:
    """What each setting is, in the words of the class above."""
    (settings,) = ast.parse(inspect.getsource(DataSettings)).body
    assert isinstance(settings, ast.ClassDef)
    return {
        a.target.id: inspect.cleandoc(str(b.value.value)).replace("`", "")
        for a, b in pairwise(settings.body)
        if isinstance(a, ast.AnnAssign)
        and isinstance(a.target, ast.Name)
        and isinstance(b, ast.Expr)
        and isinstance(b.value, ast.Constant)
    }


def problems(settings: DataSettings) -> list[str]:
    """Everything wrong with the settings that shows without reading the corpus, a line each."""
    return examine(settings)[1]


def parts(settings: DataSettings) -> list[tuple[DataSettings, float]]:
    """The corpora of a mixture and their weights.

    Raises ValueError with a line for everything wrong with them.
    """
    common = {f.name: getattr(settings, f.name) for f in fields(DataSettings)} | {"mixture": [], "source": "text"}
    made, found = [], []
    for number, part in enumerate(settings.mixture):
        own = dict(part) if isinstance(part, dict) else {}
        weight = own.pop("weight", None)
        own.setdefault("name", f"{settings.name}-{number}")
        unknown = set(own) - PART_KEYS
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            found.append(f"data.mixture: corpus {number} needs a weight above 0")
        elif unknown:
            found.append(f"data.mixture: corpus {number}: {', '.join(sorted(unknown))} cannot be set for one of them")
        elif own.get("source") in ("instructions", "mixture"):
            found.append(f"data.mixture: corpus {number}: source {own['source']} cannot be mixed")
        else:
            made.append((DataSettings(**{**common, **own}), float(weight)))
    if len(made) + len(found) < 2:
        found.append(
            "data.mixture: needs two corpora or more, such as [{weight: 3, paths: [a]}, {weight: 1, paths: [b]}]"
        )
    if len({part.name for part, _ in made}) < len(made):
        found.append("data.mixture: two corpora have the same name; change one")
    if settings.tokenizer is None:
        found.append("data.tokenizer: a mixture needs one for all; train it with python -m data.tokenizer train")
    if found:
        raise ValueError("\n".join(found))
    return made


def examine(settings: DataSettings) -> tuple[list[SourceFile], list[str]]:
    s, files = settings, list[SourceFile]()
    checks = [
        (re.fullmatch(r"\w[\w.-]*", s.name), f"data.name: {s.name!r} cannot begin a folder's name"),
        (s.vocab_size > 0, f"data.vocab_size: {s.vocab_size} must be positive"),
        (0 < s.validation_share < 1, f"data.validation_share: {s.validation_share} must lie between 0 and 1"),
        (s.shard_tokens > 0, f"data.shard_tokens: {s.shard_tokens} must be positive"),
        (s.workers is None or s.workers > 0, f"data.workers: {s.workers} must be positive, or null for all cores"),
        (s.source in SOURCES, f"data.source: {s.source!r} is not known; use {', '.join(SOURCES)}"),
        (s.source != "tokens" or s.tokenizer, "data.tokenizer: must be the one that the tokens of data.paths are of"),
        (s.token_dtype in DTYPES, f"data.token_dtype: {s.token_dtype} is not known; use {', '.join(DTYPES)}"),
        (bool(s.mixture) == (s.source == "mixture"), "data.mixture: belongs to data.source=mixture, which needs it"),
        (
            (s.dataset is None) == (s.source != "datasets"),
            "data.dataset: goes with data.source=datasets, which needs it",
        ),
        (
            not s.validation_paths or s.source in ("text", "records", "instructions"),
            f"data.validation_paths: {s.source} has none; leave it empty",
        ),
    ]
    found = [message for holds, message in checks if not holds]
    if s.source == "mixture":
        try:
            of_parts = [(part.name, problems(part)) for part, _ in parts(s)]
            return [], found + [f"{line} (in {name})" for name, lines in of_parts for line in lines]
        except (ValueError, TypeError) as error:
            return [], found + str(error).splitlines()
    try:
        files = _files(s)
        found += c4.problems(files) if s.source == "c4" else []
    except ValueError as error:
        found += str(error).splitlines()
        found += [f"data.source: c4: {c4.HINT}"] if s.source == "c4" else []
    if s.tokenizer is not None:
        found += _tokenizer_problems(s)
    return files, found


def _files(s: DataSettings) -> list[SourceFile]:
    if s.source == "stdlib":
        return stdlib_files(s.max_bytes)
    if s.source == "datasets":
        local = s.dataset and Path(s.dataset).exists()
        return text_files([str(s.dataset)], ["*"], 2**63) if local else []
    if s.source not in SOURCES:
        return []
    files = text_files(s.paths, s.patterns, s.max_bytes)
    if s.source == "c4":
        return c4.by_split(files)
    if s.validation_paths:
        own = text_files(s.validation_paths, s.patterns, 2**63, key="data.validation_paths")
        held_out = {file.path.resolve() for file in own}
        files = [file for file in files if file.path.resolve() not in held_out]
        files += [file._replace(held_out=True) for file in own]
    return files


def _tokenizer_problems(s: DataSettings) -> list[str]:
    path = str(s.tokenizer)
    if not Path(path).is_file():
        return [f"data.tokenizer: there is no file {path}; name a .model or tokenizer.json, or null to train one"]
    try:
        actual = Tokenizer(path, s.bos, s.eos).vocab_size
    except ValueError as error:
        return [str(error) if str(error).startswith("data.") else f"data.tokenizer: {error}"]
    if actual != s.vocab_size:
        return [f"data.vocab_size: is {s.vocab_size}, but {path} has {actual} tokens; set it to {actual}"]
    return []


def identity(settings: DataSettings, files: list[SourceFile]) -> dict[str, Any]:
    """What, besides the text, decides which tokens come out."""
    usual, s = DataSettings(), settings
    unusual = (
        "column",
        "token_dtype",
        "dataset",
        "dataset_name",
        "dataset_split",
        "dataset_revision",
        "bos",
        "eos",
        "shard_tokens",
    )
    return {
        "format": FORMAT,
        "source": s.source,
        "tokenizer": s.tokenizer and sha256(Path(s.tokenizer)),
        "vocab_size": s.vocab_size,
        "validation_share": s.validation_share,
        "seed": s.seed,
        **{key: getattr(s, key) for key in unusual if getattr(s, key) != getattr(usual, key)},
        **({"held_out": [f.name for f in files if f.held_out]} if s.validation_paths else {}),
    }
