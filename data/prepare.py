"""Turn a corpus into token shards, once: `prepare` reuses what an earlier call left, and goes on where one was killed.

A preparation lies in `<root>/<name>-<12 hex>`, where the digits are a hash of the text and of every setting
that shapes the tokens; what changes one of them gets a folder of its own beside the old ones. It is written
to a hidden sibling, named by a hash of the settings and the list of files, and renamed when complete, under
a file lock.

    python -m data.prepare --help
"""

import argparse
import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from filelock import FileLock, Timeout

from data import unfinished
from data.corpus import Corpus
from data.records import PART_CHARS
from data.settings import FORMAT, DataSettings, examine, identity, meanings, parts
from data.shards import COUNTS, Tokens, sha256, token_dtype
from data.sources import SourceFile
from data.tokenizer import SPECIAL, Tokenizer, find_tokenizer, train_tokenizer
from data.unfinished import MANIFEST
from data.write import State, Writing

logger = logging.getLogger(__name__)

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


def prepare(settings: DataSettings, read_along: bool = False) -> Prepared:
    """The preparation for these settings and what their files hold now, made if there is none yet.

    Any number of processes may call it at once: one does the work, the others wait. A run that will `read_along` is
    left half of the cores, and what it has read, also when something turns out to be wrong with the text.
    Raises ValueError naming the key or file at fault: for settings that cannot be, for a corpus that
    holds no text or too little, and for a preparation that was damaged.
    """
    files, found = examine(settings)
    if found:
        raise ValueError("\n".join(found))
    if settings.source == "mixture":
        return _mixed(settings, [(prepare(part), weight) for part, weight in parts(settings)])
    root, marker = Path(settings.root), marker_of(settings, files)
    if known := marked_folder(settings, marker):
        return load(known)
    cores = os.cpu_count() or 1
    workers = settings.workers or (max(1, cores // 2) if read_along else cores)
    with _locked(root, settings.name):
        if known := marked_folder(settings, marker):
            return load(known)
        corpus = Corpus(files, settings)
        folder = _folder(settings, files, corpus.sha256) if corpus.sha256 else None
        if folder is None or not folder.exists():
            _log_changes(settings, files, corpus.sha256)
            folder = _build(work_folder(settings, marker), settings, files, corpus, workers, keep=read_along)
        prepared = load(folder)
        (folder / marker).touch()
    return prepared


def work_folder(settings: DataSettings, marker: str) -> Path:
    """Where the preparation with this marker is written before it is whole."""
    return Path(settings.root) / f".{settings.name}-{marker[-16:]}.tmp"


def _folder(settings: DataSettings, files: list[SourceFile], corpus: str) -> Path:
    return Path(settings.root) / f"{settings.name}-{hashed(identity(settings, files), corpus)[:12]}"


def find(settings: DataSettings) -> Prepared | None:
    """What ``prepare`` would return if it is there already; None if there is work to do, or something to mend.

    Raises ValueError for a preparation that was damaged.
    """
    files, found = examine(settings)
    if settings.source == "mixture" and not found:
        corpora = [(prepared, weight) for part, weight in parts(settings) if (prepared := find(part))]
        return _mixed(settings, corpora) if len(corpora) == len(settings.mixture) else None
    known = None if found else marked_folder(settings, marker_of(settings, files))
    return load(known) if known else None


def _mixed(settings: DataSettings, corpora: list[tuple[Prepared, float]]) -> Prepared:
    """Preparations as one: training in the shares of their weights, validation of all that they hold out."""
    (first, _), own = corpora[0], [[prepared.fingerprint, weight] for prepared, weight in corpora]
    train = Tokens.mixed([(prepared.train, weight) for prepared, weight in corpora])
    val = Tokens.mixed([(prepared.val, weight) for prepared, weight in corpora])
    return Prepared(Path(settings.root), first.tokenizer, train, val, hashed(own), {"mixture": own})


def marked_folder(settings: DataSettings, marker: str) -> Path | None:
    """The folder of the preparation with this marker, if it is whole."""
    found = next(Path(settings.root).glob(f"{settings.name}-{HEX12}/{marker}"), None)
    return found.parent if found else None


def marker_of(settings: DataSettings, files: list[SourceFile]) -> str:
    """The name of the empty file that marks a preparation of these files as they are now."""
    return f".seen-{hashed(identity(settings, files), [[f.name, str(f.path), f.size, f.mtime] for f in files])[:16]}"


def load(folder: str | Path) -> Prepared:
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
        return Prepared(folder, Tokenizer(model), train, val, fingerprint, manifest)
    except Exception as error:  # numpy reads the head of an array as Python, and fails as that does
        raise ValueError(f"{folder}: cannot be read ({str(error)[:200]}); {mend}") from None


class _Unreadable(Exception):
    """A manifest of another kind."""


def _build(
    work: Path, settings: DataSettings, files: list[SourceFile], corpus: Corpus, workers: int, keep: bool
) -> Path:
    """Write the preparation in `work`, or go on with it, and rename it; returns the folder it is then.

    What is wrong with the text as a whole removes it, unless told to `keep` it; whatever else happens leaves it, also a
    file that cannot be read, for the next call to go on.
    """
    unfinished.begin(work, identity(settings, files), corpus)
    if (work / MANIFEST).exists():  # all was done but for that
        return _put_in_place(work, settings, files)
    try:
        tokenizer = _make_tokenizer(work, settings, corpus)
        unfinished.release(work, tokenizer)
        writing = Writing(work, corpus, tokenizer, settings.shard_tokens)
        try:
            splits = writing(workers)
        except ValueError as error:
            raise unfinished.kept(error, work) from None
        _check(writing, splits, corpus)
        manifest = _manifest(settings, files, writing.state, tokenizer, splits)
    except unfinished.Kept:
        raise
    except ValueError:
        if not keep:
            shutil.rmtree(work)
        raise
    _write_synced(work / MANIFEST, json.dumps(manifest, indent=1))
    return _put_in_place(work, settings, files)


def _put_in_place(work: Path, settings: DataSettings, files: list[SourceFile]) -> Path:
    """Rename what is whole, as its manifest says, without what only its making needed; returns what it is then."""
    manifest, tokenizer = json.loads((work / MANIFEST).read_text()), find_tokenizer(work)
    kept = {name for split in manifest["splits"].values() for shard in split["shards"] for name in shard["files"]}
    for file in work.iterdir():
        if file.name not in {*kept, MANIFEST, SPECIAL} and file != tokenizer:
            file.unlink()
    folder, marker = _folder(settings, files, manifest["corpus"]["sha256"]), marker_of(settings, files)
    (work / marker).touch()  # it can be found as soon as it is there
    if folder.exists():
        logger.info("%s holds the same already", folder)
        (folder / marker).touch()
        shutil.rmtree(work)
    else:
        os.replace(work, folder)
        logger.info("prepared %s", describe(manifest, folder))
    return folder


def _write_synced(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _make_tokenizer(work: Path, settings: DataSettings, corpus: Corpus) -> Tokenizer:
    if settings.tokenizer is None:
        path = work / "tokenizer.model"
        if path.exists():  # written by the call that was killed
            return Tokenizer(path)
        logger.info("training a tokenizer of %d pieces", settings.vocab_size)
        return train_tokenizer(corpus.training_texts(), path, settings.vocab_size, settings.seed)
    tokenizer = Tokenizer(Tokenizer(settings.tokenizer, settings.bos, settings.eos).copy_to(work))
    if tokenizer.decode(tokenizer.encode(EXACTNESS_PROBE)) != EXACTNESS_PROBE:
        logger.warning("%s does not keep all white space and characters as they are", settings.tokenizer)
    return tokenizer


def _check(writing: Writing, splits: dict[str, list[dict[str, Any]]], corpus: Corpus) -> None:
    """Say what was skipped and cut. Raises ValueError if files changed meanwhile, or a split holds nothing."""
    if changed := corpus.changed():
        raise ValueError(f"data.paths: {', '.join(changed[:8])} changed while it was being read; start again")
    skipped, documents, whole = writing.describe_skipped(), writing.state.documents, len(corpus.files)
    if not documents:
        raise corpus.nothing(skipped)
    if skipped:
        logger.warning("skipped %s", skipped)
    whole -= sum(writing.state.skipped_counts.values())
    if corpus.is_text and documents > whole:
        logger.info("cut files longer than %d characters: %d documents of %d files", PART_CHARS, documents, whole)
    if empty := [split for split, entries in splits.items() if not sum(entry["documents"] for entry in entries)]:
        raise ValueError(
            f"data.validation_share: leaves no document of {documents} for {' and '.join(empty)}; change it, or "
            "name data.validation_paths"
        )


def _manifest(
    settings: DataSettings, files: list[SourceFile], state: State, tokenizer: Tokenizer, splits: dict[str, list[dict]]
) -> dict[str, Any]:
    checksums = [file["sha256"] for entries in splits.values() for entry in entries for file in entry["files"].values()]
    return {
        "format": FORMAT,
        "fingerprint": hashed(tokenizer.sha256, checksums),
        "identity": identity(settings, files),
        "settings": asdict(settings),
        "corpus": {
            "sha256": state.chain,
            "documents": state.documents,
            "bytes": state.bytes,
            "skipped": state.skipped,
            "skipped_counts": state.skipped_counts,
        },
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, **tokenizer.special},
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "splits": {
            split: {**{key: sum(entry[key] for entry in entries) for key in COUNTS}, "shards": entries}
            for split, entries in splits.items()
        },
    }


def _log_changes(settings: DataSettings, files: list[SourceFile], corpus: str | None) -> None:
    """Say in what the newest preparation of the same name differs, if there is one; `corpus` if that is known."""
    found = Path(settings.root).glob(f"{settings.name}-{HEX12}/{MANIFEST}")
    manifests = sorted(found, key=lambda path: path.stat().st_mtime)
    if not manifests:
        return
    try:
        before = json.loads(manifests[-1].read_text())
        old = {**before["identity"], "corpus": before["corpus"]["sha256"][:12]}
    except (KeyError, TypeError, json.JSONDecodeError):
        logger.warning("%s: cannot be read; it is left alone", manifests[-1])
        return
    new = {**identity(settings, files), **({"corpus": corpus[:12]} if corpus else {})}
    changes = [f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key]]
    said = ", ".join(changes) or "its files are others"
    logger.info("%s does not fit: %s; preparing anew", manifests[-1].parent, said)


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Hold the lock on a name's preparations."""
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
        for leftover in root.glob(f".{name}-*.tmp"):
            logger.info("%s was left by a preparation that did not finish: the same settings go on with it", leftover)
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


def hashed(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def command(settings: DataSettings) -> str:
    """What prepares the same by hand."""
    words = ["python", "-m", "data.prepare"]
    for entry in fields(DataSettings):
        value, flag = getattr(settings, entry.name), f"--{entry.name.replace('_', '-')}"
        if value == getattr(DataSettings(), entry.name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return shlex.join(words)


def parser() -> argparse.ArgumentParser:
    about = "Prepare a corpus by hand, as a run with the same settings (data.*) does by itself."
    made = argparse.ArgumentParser(prog="python -m data.prepare", description=about)
    defaults, meaning = DataSettings(), meanings()
    for entry in fields(DataSettings):
        default = getattr(defaults, entry.name)
        if entry.name == "mixture":
            continue  # each of its corpora by itself, or data=mixture of a run
        several, flag = isinstance(default, list), f"--{entry.name.replace('_', '-')}"
        if isinstance(default, bool):
            made.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=meaning[entry.name])
            continue
        shown = " ".join(default) if several else default
        (kind,) = [t for t in get_args(entry.type) or (entry.type,) if t is not type(None)]
        made.add_argument(
            flag,
            type=str if several else kind,
            nargs="*" if several else None,
            default=default,
            help=(meaning[entry.name] + (f" Default: {shown}" if shown not in ("", None) else "")).replace("%", "%%"),
        )
    return made


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepared = prepare(DataSettings(**vars(parser().parse_args())))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(describe(prepared.manifest, prepared.folder))


if __name__ == "__main__":
    main()
