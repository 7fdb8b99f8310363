"""Checks of data settings that need no look into the corpus."""

import math
import re
from dataclasses import fields
from pathlib import Path

from data.settings import DTYPES, SOURCES, DataSettings
from data.sources.files import C4_HINT, SourceFile, c4_by_split, c4_problems, stdlib_files, text_files
from data.tokenizer import MOST_PADDING, Tokenizer

PART_KEYS = {
    "name", "source", "paths", "patterns", "max_bytes", "validation_paths", "column", "dataset", "dataset_name",
    "dataset_split", "dataset_revision", "streaming", "validation_share", "token_dtype",
}  # fmt: skip


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
        found.append("data.tokenizer: a mixture needs one for all; train it with python -m data.train_tokenizer")
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
        found += c4_problems(files) if s.source == "c4" else []
    except ValueError as error:
        found += str(error).splitlines()
        found += [f"data.source: c4: {C4_HINT}"] if s.source == "c4" else []
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
        return c4_by_split(files)
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
        tokenizer = Tokenizer(path, s.bos, s.eos)
    except ValueError as error:
        return [str(error) if str(error).startswith("data.") else f"data.tokenizer: {error}"]
    actual = tokenizer.vocab_size
    if s.vocab_size - MOST_PADDING <= actual and tokenizer.fits(s.vocab_size):
        return []
    return [f"data.vocab_size: is {s.vocab_size}, but {path} has {actual} tokens; set it to {actual}"]
