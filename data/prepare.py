"""Turn a corpus into token shards, once.

A preparation is a folder `<root>/<name>-<12 hex digits>`. The digits are a hash of the text and of every setting that
determines the tokens, so another text or setting gets another folder. The shards are written to a hidden folder under a
file lock, and the folder is renamed when it is complete. A later call with the same settings reuses the folder. After
an interruption, it resumes the preparation.

    python -m data.prepare --help
"""

import argparse
import errno
import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from data.file_lock import file_lock
from data.preparation.corpus_writer import CorpusWriter
from data.preparation.finish import check, mark, put_in_place, remove, write_manifest
from data.preparation.plan import HEX12, PreparationPlan, hash_of
from data.preparation.recovery import ResumableError, confirm_tokenizer, make_work_folder, resumable
from data.settings import DataSettings
from data.shards.reader import Tokens
from data.sources.corpus import Corpus
from data.token_dataset import MANIFEST, PreparedDataset, content_of, describe, load
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_tokenizer
from data.wording import exit_with, python_command

logger = logging.getLogger(__name__)

ROUND_TRIP_PROBE = " a  b\r\n\n\tc ﬁ \u2581 \U00010348 "


def problems(settings: DataSettings) -> list[str]:
    """One message, with the key and the fix, per problem that is found without reading the corpus."""
    return PreparationPlan(settings).problems


def prepare(settings: DataSettings, read_along: bool = False) -> PreparedDataset:
    """Open the preparation for these settings and the current content of their files. If it does not exist, create it.

    Several processes may call this at once: one process prepares, the others wait for it.

    Args:
        read_along: Whether a run reads the shards while they are written. If so, half of the cores are left to the run
            (unless `workers` is set), and the shards are not deleted if the corpus turns out to be unusable.

    Raises:
        ValueError: The settings are invalid, the corpus has too little text or a file that cannot be read, the disk is
            full, or the preparation is damaged. The message names the key or file and the fix.
        OSError: The disk fails, or a worker process was killed.
    """
    plan = PreparationPlan(settings)
    plan.require_no_problems()
    return _prepare(plan, read_along)


def find(settings: DataSettings) -> PreparedDataset | None:
    """The complete preparation for these settings and the current names, sizes and times of the corpus's files.

    Reads no text. None if there is no such preparation, or if the settings have a problem.

    Raises:
        ValueError: The preparation is damaged.
    """
    plan = PreparationPlan(settings)
    return None if plan.problems else _find(plan)


def find_by_fingerprint(
    settings: DataSettings, fingerprint: str, mixture: list[tuple[str, float]] | None = None
) -> PreparedDataset | None:
    """The complete preparation in `settings.root` whose `PreparedDataset.fingerprint` is `fingerprint`, or None.

    The corpus and the tokenizer need not exist: a run that has trained on the preparation can resume without them.

    Args:
        mixture: For source `mixture`, the fingerprint and the weight of each corpus, as in `manifest["mixture"]` of the
            prepared mixture. If `settings` has other weights, nothing is found. Not used for other sources.

    Raises:
        ValueError: The preparation is damaged.
    """
    folders = {str(manifest["fingerprint"]): folder for folder, manifest in manifests(settings.root)}
    if settings.source != "mixture":
        return load(folders[fingerprint]) if fingerprint in folders else None
    plan = PreparationPlan(settings)
    parts = [(part, weight) for (part, _), (_, weight) in zip(mixture or [], plan.parts, strict=False)]
    if hash_of(parts) != fingerprint or not all(part in folders for part, _ in parts):
        return None
    return _mix(plan, [(load(folders[part]), weight) for part, weight in parts])


def manifests(root: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and manifest of every complete preparation in `root`, by folder; unreadable manifests are left out."""
    for file in sorted(Path(root).glob(f"*-{HEX12}/{MANIFEST}")):
        with suppress(OSError, ValueError, RecursionError):
            manifest = json.loads(file.read_text())
            if isinstance(manifest, dict) and {"fingerprint", "identity", "tokenizer"} <= manifest.keys():
                yield file.parent, manifest


def _find(plan: PreparationPlan) -> PreparedDataset | None:
    if plan.parts:
        corpora = [(found, weight) for part, weight in plan.parts if (found := _find(part))]
        return _mix(plan, corpora) if len(corpora) == len(plan.parts) else None
    folder = plan.finished()
    return load(folder) if folder else None


def _prepare(plan: PreparationPlan, read_along: bool = False) -> PreparedDataset:
    if plan.parts:
        return _mix(plan, [(_prepare(part), weight) for part, weight in plan.parts])
    if found := _find(plan):
        return found
    with _locked(plan):
        if found := _find(plan):  # prepared by the process that held the lock
            return found
        corpus = Corpus(plan.files, plan.settings)
        folder = plan.folder(corpus.sha256) if corpus.sha256 else None
        if folder is None or not folder.exists():
            plan.log_changes(corpus.sha256)
            try:
                folder = _build(plan, corpus, read_along)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ValueError(f"data.root: {plan.root} is full; free space, and the same command resumes") from None
        prepared = load(folder)
        mark(plan, folder)
    return prepared


def _mix(plan: PreparationPlan, corpora: list[tuple[PreparedDataset, float]]) -> PreparedDataset:
    """One dataset from several: training with shares given by the weights, validation on all held-out documents."""
    (first, _), own = corpora[0], [[prepared.fingerprint, weight] for prepared, weight in corpora]
    train = Tokens.mixed([(prepared.train, weight) for prepared, weight in corpora])
    val = Tokens.mixed([(prepared.val, weight) for prepared, weight in corpora])
    content = hash_of([[content_of(prepared.manifest), weight] for prepared, weight in corpora])
    manifest = {"mixture": own, "content": content}
    return PreparedDataset(plan.root, first.tokenizer, train, val, hash_of(own), manifest)


def _build(plan: PreparationPlan, corpus: Corpus, read_along: bool) -> Path:
    """Write or resume the preparation in its work folder, rename that folder, and return the new path.

    If the corpus is unusable, the work folder is removed, unless a run reads along. After any other failure the folder
    is kept, and the next call resumes.
    """
    work, settings, cores = plan.work_folder, plan.settings, os.cpu_count() or 1
    make_work_folder(plan, corpus)
    if (work / MANIFEST).exists():  # interrupted just before the rename
        return put_in_place(plan)
    workers = settings.workers or (max(1, cores // 2) if read_along else cores)
    try:
        tokenizer = _make_tokenizer(plan, corpus)
        confirm_tokenizer(work, tokenizer)
        writer = CorpusWriter(work, corpus, tokenizer, settings.shard_tokens)
        try:
            shards = writer.write(workers)
        except ValueError as error:
            raise resumable(error, work) from None
        check(writer, shards, corpus)
    except ResumableError:
        raise
    except ValueError:
        if not read_along:
            remove(work)
        raise
    write_manifest(plan, writer, tokenizer, shards)
    return put_in_place(plan)


def _make_tokenizer(plan: PreparationPlan, corpus: Corpus) -> Tokenizer:
    settings, work = plan.settings, plan.work_folder
    if settings.tokenizer is None:
        path = work / "tokenizer.model"
        if path.exists():  # trained before an interruption
            return Tokenizer(path)
        logger.info("training a tokenizer of %d pieces", settings.vocab_size)
        return train_tokenizer(corpus.training_texts(), path, settings.vocab_size, settings.seed)
    tokenizer = Tokenizer(Tokenizer(settings.tokenizer, settings.bos, settings.eos).copy_to(work))
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP_PROBE)) != ROUND_TRIP_PROBE:
        logger.warning("the tokenizer %s changes white space or characters of texts", settings.tokenizer)
    return tokenizer


@contextmanager
def _locked(plan: PreparationPlan) -> Iterator[None]:
    """Hold the lock on all preparations of a plan's name."""
    root, name = plan.root, plan.settings.name
    with ExitStack() as held:
        try:
            root.mkdir(parents=True, exist_ok=True)
            held.enter_context(file_lock(root / f".{name}.lock", on_wait=logger.info))
        except OSError as error:
            raise ValueError(f"data.root: cannot write to {root} ({error}); choose another folder") from None
        for leftover in root.glob(f".{name}-*.tmp"):
            logger.info("%s is an interrupted preparation; the same settings resume it", leftover)
        yield


def command(settings: DataSettings) -> str:
    """The command that prepares `settings` (not a mixture) by hand, quoted for a shell."""
    words: list[str] = []
    for entry in fields(DataSettings):
        value, flag = getattr(settings, entry.name), f"--{entry.name.replace('_', '-')}"
        if value == getattr(DataSettings(), entry.name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return python_command("data.prepare", *words)


def parser() -> argparse.ArgumentParser:
    about = "Prepare a corpus by hand. A run with the same settings (data.*) does the same automatically."
    p = argparse.ArgumentParser(prog="python -m data.prepare", description=about)
    meaning = meanings()
    for entry in fields(DataSettings):
        default, flag = getattr(DataSettings(), entry.name), f"--{entry.name.replace('_', '-')}"
        if entry.name == "mixture":
            continue  # not on the command line: prepare each corpus, or start a run with data=mixture
        if isinstance(default, bool):
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=meaning[entry.name])
            continue
        several = isinstance(default, list)
        shown = " ".join(default) if several else default
        (kind,) = [t for t in get_args(entry.type) or (entry.type,) if t is not type(None)]
        about = (meaning[entry.name] + (f" Default: {shown}" if shown not in ("", None) else "")).replace("%", "%%")
        form: dict[str, Any] = {"type": str, "nargs": "*"} if several else {"type": kind}
        p.add_argument(flag, **form, default=default, help=about)
    return p


def meanings() -> dict[str, str]:
    """The docstring of each setting of DataSettings, by the setting's name."""
    documented = re.findall(r'^    (\w+): .*\n    """([^"]+)"""', inspect.getsource(DataSettings), re.MULTILINE)
    return {name: inspect.cleandoc(text).replace("`", "") for name, text in documented}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parser().parse_args()
    try:
        prepared = prepare(DataSettings(**vars(args)))
    except (ValueError, OSError) as error:
        exit_with(str(error), args)
    print(describe(prepared.manifest, prepared.folder))


if __name__ == "__main__":
    main()
