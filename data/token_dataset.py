"""Open and describe prepared datasets."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import sha256
from data.shards.reader import Shard, Tokens
from data.tokenizer import FILES as TOKENIZER_FILES
from data.tokenizer import Tokenizer
from data.wording import counted

FORMAT = 2  # of a prepared folder; raise it also when the same settings give other tokens than before
MANIFEST, FILES = "manifest.json", "files.json"


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset, opened.

    Attributes:
        folder: The folder of the dataset; for a mixture, the folder of all prepared datasets.
        tokenizer: The tokenizer that made the tokens.
        train: The training split.
        val: The validation split.
        fingerprint: 64 hex digits that depend on the tokenizer, all tokens, and the names of the documents.
        manifest: The content of manifest.json. For a mixture: `mixture`, a list of [fingerprint, weight] of the
            corpora, and `content` (see `content_of`). Empty for a `StreamedDataset`.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str
    manifest: dict[str, Any]


def load(folder: str | Path) -> PreparedDataset:
    """Open the prepared dataset in `folder`.

    Checks the lengths of all files and the checksum of the tokenizer. `python -m data.inspect` checks all checksums.

    Raises:
        ValueError: The folder or a file is missing or cannot be read, a file's length differs from the manifest's, or
            the tokenizer has changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name a prepared dataset, such as prepared/NAME-HASH")
    fix = f"delete the folder {folder} to prepare it again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise _OtherFormat(f"has format {manifest['format']}, but this version reads {FORMAT}")
        shards = {split: manifest["splits"][split]["shards"] for split in ("train", "val")}
        lengths = {n: file["bytes"] for split in shards.values() for s in split for n, file in s["files"].items()}
        names = {split: [str(shard["name"]) for shard in entries] for split, entries in shards.items()}
        fingerprint, tokenizer_hash = str(manifest["fingerprint"]), manifest["tokenizer"]["sha256"]
        special = {key: manifest["tokenizer"].get(key) for key in ("bos", "eos")}
        dtype = np.dtype(manifest["dtype"])
        if not all(names.values()) or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError("no shards, or of an unknown type")
    except _OtherFormat as error:
        raise ValueError(f"{folder / MANIFEST}: {error}; {fix}") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read ({error!r}); {fix}") from None
    for name, length in lengths.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else "no"
        if actual != length:
            raise ValueError(f"{folder / name}: has {actual} bytes instead of {length}; {fix}")
    models = [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]
    model = next((path for path in models if sha256(path) == tokenizer_hash), None)
    if model is None:
        wrong = models[0] if models else folder / TOKENIZER_FILES[0]
        raise ValueError(f"{wrong}: not the tokenizer that these shards were made with; {fix}")
    try:
        train, val = (
            Tokens([Shard(folder, name, dtype) for name in names[split]], dtype) for split in ("train", "val")
        )
        tokenizer = Tokenizer(model, **special, look_beside=False)
        return PreparedDataset(folder, tokenizer, train, val, fingerprint, manifest)
    except Exception as error:  # numpy evaluates an array's header as Python code, which may raise any exception
        raise ValueError(f"{folder}: cannot be read ({str(error)[:200]}); {fix}") from None


class _OtherFormat(Exception):
    """A manifest of a format that this version does not read."""


def content_of(manifest: dict[str, Any]) -> str | None:
    """The SHA-256 (64 hex digits) of the tokenizer and all tokens. It does not depend on the documents' names.

    `manifest` is that of a `PreparedDataset`. For a mixture, the hash also depends on the weights. None for a
    `StreamedDataset`, whose manifest is empty.
    """
    if "splits" not in manifest:
        return manifest.get("content")
    shards = [shard["files"] for split in ("train", "val") for shard in manifest["splits"][split]["shards"]]
    tokens = [
        file["sha256"] for files in shards for name, file in files.items() if name.endswith((".bin", ".given.npy"))
    ]
    return hashlib.sha256(json.dumps([manifest["tokenizer"]["sha256"], tokens]).encode()).hexdigest()


def describe(manifest: dict[str, Any], folder: Path) -> str:
    """One line to be printed: the folder, and the sizes of the splits and the vocabulary. Not for a mixture."""
    splits = ", ".join(
        f"{split} {entry['tokens']:,} tokens of {counted(entry['documents'], 'document')} "
        f"({entry['bytes'] / 1e6:.1f} MB, {entry['bytes'] / entry['tokens']:.2f} bytes per token)"
        for split, entry in manifest["splits"].items()
    )
    return f"{folder}: {splits}; vocabulary {manifest['tokenizer']['vocab_size']}"
