"""Turn a corpus into token shards, once: `prepare` reuses what an earlier call left.

A preparation lies in `<root>/<name>-<12 hex>`, where the digits are a hash of the text and of every setting
that shapes the tokens; what changes one of them gets a folder of its own beside the old ones. It is written
to a hidden sibling and renamed when complete, under a file lock.

    python -m data.prepare --help
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from data.corpus import Corpus
from data.progress import progress
from data.settings import FORMAT, DataSettings, examine, identity
from data.shards import ShardWriter, Tokens, sha256, token_dtype
from data.sources import Document, SourceFile
from data.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

BATCH_CHARS = 2**22
EXACTNESS_PROBE = " a  b\r\n\n\tc ﬁ \u2581 \U00010348 "
HEX12 = 12 * "[0-9a-f]"


@dataclass(frozen=True)
class Prepared:
    """A preparation, opened. `fingerprint` (64 hex) names its tokenizer and its tokens, wherever it lies."""

    folder: Path
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fingerprint: str
    manifest: dict[str, Any]


def prepare(settings: DataSettings) -> Prepared:
    """The preparation for these settings and what their files hold now, made if there is none yet.

    Any number of processes may call it at once: one does the work, the others wait.
    Raises ValueError naming the key or file at fault: for settings that cannot be, for a corpus that
    holds no text or too little, and for a preparation that was damaged.
    """
    files, found = examine(settings)
    if found:
        raise ValueError("\n".join(found))
    root, seen = Path(settings.root), _seen(settings, files)
    if known := _known(settings, files):
        return load(known)
    with _locked(root, settings.name):
        if known := _known(settings, files):
            return load(known)
        corpus = Corpus(files, settings)
        folder = root / f"{settings.name}-{_hash(identity(settings), corpus.sha256)[:12]}"
        if not folder.exists():
            _log_changes(root, settings, corpus)
            _build(folder, settings, corpus)
        prepared = load(folder)
        (folder / seen).touch()
    return prepared


def find(settings: DataSettings) -> Prepared | None:
    """What ``prepare`` would return if it is there already; None if there is work to do, or something to mend.

    Raises ValueError for a preparation that was damaged.
    """
    files, found = examine(settings)
    known = None if found else _known(settings, files)
    return load(known) if known else None


def _known(settings: DataSettings, files: list[SourceFile]) -> Path | None:
    """The folder of a preparation that was made from these files as they are now."""
    marker = next(Path(settings.root).glob(f"{settings.name}-{HEX12}/{_seen(settings, files)}"), None)
    return marker.parent if marker else None


def _seen(settings: DataSettings, files: list[SourceFile]) -> str:
    """The name of the empty file that marks a preparation of these files."""
    return f".seen-{_hash(identity(settings), [[f.name, str(f.path), f.size, f.mtime] for f in files])[:16]}"


def load(folder: str | Path) -> Prepared:
    """Open a preparation.

    Raises ValueError if a file is missing or not as long as the manifest says, or the tokenizer another.
    """
    folder = Path(folder)
    mend = f"delete the folder {folder} to prepare it again"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{folder}: has format {manifest['format']}, this version reads {FORMAT}; {mend}")
        (train,), (val,) = (manifest["splits"][split]["shards"] for split in ("train", "val"))
        lengths = {name: file["bytes"] for shard in (train, val) for name, file in shard["files"].items()}
        tokenizer_hash, fingerprint = manifest["tokenizer"]["sha256"], manifest["fingerprint"]
        dtype = np.dtype(manifest["dtype"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'manifest.json'}: cannot be read ({error!r}); {mend}") from None
    for name, length in lengths.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else "no"
        if actual != length:
            raise ValueError(f"{folder / name}: has {actual} bytes instead of {length}; {mend}")
    model = folder / "tokenizer.model"
    if not model.exists() or sha256(model) != tokenizer_hash:
        raise ValueError(f"{model}: is not the tokenizer these shards were made with; {mend}")
    return Prepared(
        folder=folder,
        tokenizer=Tokenizer(model),
        train=Tokens(folder, train["name"], dtype),
        val=Tokens(folder, val["name"], dtype),
        fingerprint=fingerprint,
        manifest=manifest,
    )


def _build(folder: Path, settings: DataSettings, corpus: Corpus) -> None:
    """Write the preparation beside `folder`, then rename it; a failure leaves nothing behind."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir()
    try:
        tokenizer = _make_tokenizer(temporary / "tokenizer.model", settings, corpus)
        entries = _write_shards(temporary, tokenizer, corpus)
        manifest = _manifest(settings, corpus, tokenizer, entries)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    logger.info("prepared %s", describe(manifest, folder))


def _make_tokenizer(path: Path, settings: DataSettings, corpus: Corpus) -> Tokenizer:
    if settings.tokenizer is None:
        logger.info("training a tokenizer of %d pieces", settings.vocab_size)
        texts = (document.text for document, split in corpus.documents() if split == "train")
        return train_tokenizer(texts, path, settings.vocab_size, settings.seed)
    shutil.copyfile(settings.tokenizer, path)
    tokenizer = Tokenizer(path)
    if tokenizer.decode(tokenizer.encode(EXACTNESS_PROBE)) != EXACTNESS_PROBE:
        logger.warning("%s does not keep all white space and characters as they are", settings.tokenizer)
    return tokenizer


def _write_shards(folder: Path, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, dict]:
    """Tokenise all documents into one shard per split; returns the shards' manifest entries."""
    dtype, has_prompts = token_dtype(tokenizer.vocab_size), corpus.has_prompts
    with (
        ShardWriter(folder, "train-00000", dtype) as train,
        ShardWriter(folder, "val-00000", dtype) as val,
        progress("tokenising", corpus.text_bytes) as advance,
    ):
        writers = {"train": train, "val": val}
        for batch in _batches(corpus.documents()):
            given = tokenizer.encode_batch([document.text[: document.given] for document, _ in batch])
            encoded = tokenizer.encode_batch([document.text[document.given :] for document, _ in batch])
            for (document, split), prompt, tokens in zip(batch, given, encoded, strict=True):
                text_bytes = len(document.text.encode())
                framed = np.concatenate([[tokenizer.bos_id], prompt, tokens, [tokenizer.eos_id]])
                writers[split].add(document.name, framed, text_bytes, len(prompt) if has_prompts else None)
                advance(text_bytes)
    return {split: writer.entry() for split, writer in writers.items()}


def _batches(documents: Iterable[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    batch: list[tuple[Document, str]] = []
    chars = 0
    for document, split in documents:
        batch.append((document, split))
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _manifest(settings: DataSettings, corpus: Corpus, tokenizer: Tokenizer, entries: dict[str, dict]) -> dict[str, Any]:
    totals = ("documents", "tokens", "bytes")
    checksums = [file["sha256"] for entry in entries.values() for file in entry["files"].values()]
    return {
        "format": FORMAT,
        "fingerprint": _hash(tokenizer.sha256, checksums),
        "identity": identity(settings),
        "settings": asdict(settings),
        "corpus": {
            "sha256": corpus.sha256,
            "documents": len(corpus),
            "bytes": corpus.text_bytes,
            "skipped": corpus.skipped,
        },
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "splits": {
            split: {**{key: entry[key] for key in totals}, "shards": [entry]} for split, entry in entries.items()
        },
    }


def _log_changes(root: Path, settings: DataSettings, corpus: Corpus) -> None:
    """Say in what the newest preparation of the same name differs, if there is one."""
    manifests = sorted(root.glob(f"{settings.name}-{HEX12}/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        return
    try:
        before = json.loads(manifests[-1].read_text())
        old = {**before["identity"], "corpus": before["corpus"]["sha256"][:12]}
    except (KeyError, TypeError, json.JSONDecodeError):
        logger.warning("%s: cannot be read; it is left alone", manifests[-1])
        return
    new = {**identity(settings), "corpus": corpus.sha256[:12]}
    changes = [f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key]]
    logger.info("%s does not fit: %s; preparing anew", manifests[-1].parent, ", ".join(changes))


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Hold the lock on a name's preparations, and clear away what a killed process left half done."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process to prepare %s", name)
            lock.acquire()
    except OSError as error:
        raise ValueError(f"data.root: cannot write to {root} ({error}); choose another folder") from None
    try:
        for leftover in root.glob(f".{name}-{HEX12}.tmp"):
            logger.info("removing %s, left by a preparation that did not finish", leftover)
            shutil.rmtree(leftover)
        yield
    finally:
        lock.release()


def describe(manifest: dict[str, Any], folder: Path) -> str:
    """A few words on each split, for people."""
    splits = ", ".join(
        f"{split} {entry['tokens']:,} tokens of {entry['documents']:,} documents "
        f"({entry['bytes'] / 1e6:.1f} MB, {entry['bytes'] / entry['tokens']:.2f} bytes a token)"
        for split, entry in manifest["splits"].items()
    )
    return f"{folder}: {splits}; vocabulary {manifest['tokenizer']['vocab_size']}"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description="Prepare a corpus by hand.")
    defaults = DataSettings()
    for entry in fields(DataSettings):
        default = getattr(defaults, entry.name)
        several = isinstance(default, list)
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=str if several or default is None else type(default),
            nargs="*" if several else None,
            default=default,
            help=f"default: {' '.join(default) if several else default}",
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepared = prepare(DataSettings(**vars(parser.parse_args())))
    except ValueError as error:
        sys.exit(str(error))
    print(describe(prepared.manifest, prepared.folder))


if __name__ == "__main__":
    main()
