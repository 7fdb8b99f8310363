"""A prepared dataset: open it, and describe it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import sha256
from data.shards.reader import Tokens
from data.tokenizer import Tokenizer, find_tokenizer


@dataclass(frozen=True)
class PreparedDataset:
    """A preparation, opened. `fingerprint` (64 hex) names its tokenizer and its tokens, wherever it lies."""

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str
    manifest: dict[str, Any]


def load(folder: str | Path) -> PreparedDataset:
    """Open a preparation.

    Raises ValueError if a file is missing or not as long as the manifest says, or the tokenizer another.
    """
    folder = Path(folder)
    mend = f"delete the folder {folder} to prepare it again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise _Unreadable(f"has format {manifest['format']}, this version reads {FORMAT}")
        shards = {split: manifest["splits"][split]["shards"] for split in ("train", "val")}
        lengths = {n: file["bytes"] for split in shards.values() for s in split for n, file in s["files"].items()}
        names = {split: [str(shard["name"]) for shard in entries] for split, entries in shards.items()}
        tokenizer_hash, fingerprint = manifest["tokenizer"]["sha256"], str(manifest["fingerprint"])
        dtype = np.dtype(manifest["dtype"])
        if not all(names.values()) or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError("no shards, or of an unknown type")
    except _Unreadable as error:
        raise ValueError(f"{folder / MANIFEST}: {error}; {mend}") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read ({error!r}); {mend}") from None
    for name, length in lengths.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else "no"
        if actual != length:
            raise ValueError(f"{folder / name}: has {actual} bytes instead of {length}; {mend}")
    model = find_tokenizer(folder) or folder / "tokenizer.model"
    if not model.exists() or sha256(model) != tokenizer_hash:
        raise ValueError(f"{model}: is not the tokenizer these shards were made with; {mend}")
    try:
        train, val = (Tokens(folder, names[split], dtype) for split in ("train", "val"))
        return PreparedDataset(folder, Tokenizer(model), train, val, fingerprint, manifest)
    except Exception as error:  # numpy reads the head of an array as Python, and fails as that does
        raise ValueError(f"{folder}: cannot be read ({str(error)[:200]}); {mend}") from None


class _Unreadable(Exception):
    """A manifest of another kind."""


def describe(manifest: dict[str, Any], folder: Path) -> str:
    """A few words on each split, for people."""
    splits = ", ".join(
        f"{split} {entry['tokens']:,} tokens of {entry['documents']:,} documents "
        f"({entry['bytes'] / 1e6:.1f} MB, {entry['bytes'] / entry['tokens']:.2f} bytes a token)"
        for split, entry in manifest["splits"].items()
    )
    return f"{folder}: {splits}; vocabulary {manifest['tokenizer']['vocab_size']}"


FORMAT = 2  # of the folder; also to be raised when the same settings would give other tokens

MANIFEST, FILES = "manifest.json", "files.json"
