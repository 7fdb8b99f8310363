"""Turn a corpus into token shards, once: `prepare` reuses what an earlier call left, and goes on where one was killed.

A preparation lies in `<root>/<name>-<12 hex>`, where the digits are a hash of the text and of every setting
that shapes the tokens; what changes one of them gets a folder of its own beside the old ones. It is written
to a hidden sibling, named by a hash of the settings and the list of files, and renamed when complete, under
a file lock.

    python -m data.prepare --help
"""

import argparse
import ast
import inspect
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout

from data.atomic import write_atomic
from data.checks import examine, parts
from data.preparation import recovery as unfinished
from data.preparation.corpus_writer import State, Writing
from data.preparation.plan import _folder, _log_changes, hashed, identity, marked_folder, marker_of, work_folder
from data.settings import DataSettings
from data.shards.reader import COUNTS, Tokens, token_dtype
from data.sources.corpus import Corpus
from data.sources.files import SourceFile
from data.sources.records import PART_CHARS
from data.token_dataset import FORMAT, MANIFEST, PreparedDataset, describe, load
from data.tokenizer import SPECIAL, Tokenizer, find_tokenizer
from data.train_tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

EXACTNESS_PROBE = " a  b\r\n\n\tc ﬁ \u2581 \U00010348 "


def prepare(settings: DataSettings, read_along: bool = False) -> PreparedDataset:
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


def find(settings: DataSettings) -> PreparedDataset | None:
    """What ``prepare`` would return if it is there already; None if there is work to do, or something to mend.

    Raises ValueError for a preparation that was damaged.
    """
    files, found = examine(settings)
    if settings.source == "mixture" and not found:
        corpora = [(prepared, weight) for part, weight in parts(settings) if (prepared := find(part))]
        return _mixed(settings, corpora) if len(corpora) == len(settings.mixture) else None
    known = None if found else marked_folder(settings, marker_of(settings, files))
    return load(known) if known else None


def _mixed(settings: DataSettings, corpora: list[tuple[PreparedDataset, float]]) -> PreparedDataset:
    """Preparations as one: training in the shares of their weights, validation of all that they hold out."""
    (first, _), own = corpora[0], [[prepared.fingerprint, weight] for prepared, weight in corpora]
    train = Tokens.mixed([(prepared.train, weight) for prepared, weight in corpora])
    val = Tokens.mixed([(prepared.val, weight) for prepared, weight in corpora])
    return PreparedDataset(Path(settings.root), first.tokenizer, train, val, hashed(own), {"mixture": own})


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
    write_atomic(work / MANIFEST, json.dumps(manifest, indent=1))
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


if __name__ == "__main__":
    main()
