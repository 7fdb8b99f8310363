"""The end of a preparation: check the shards, write the manifest, and give the folder its final name."""

import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.atomic import write_atomic
from data.preparation.corpus_writer import CorpusWriter
from data.preparation.plan import PreparationPlan, hash_of
from data.shards.reader import COUNTS, token_dtype
from data.sources.corpus import Corpus
from data.sources.file_search import shorten
from data.sources.records import PART_CHARS
from data.token_dataset import FORMAT, MANIFEST, describe
from data.tokenizer import SPECIAL, Tokenizer, find_tokenizer
from data.wording import counted

logger = logging.getLogger(__name__)

Shards = dict[str, list[dict[str, Any]]]  # the manifest's entries of the shards, for each split


def check(writer: CorpusWriter, shards: Shards, corpus: Corpus) -> None:
    """Check the shards that were written, and log the numbers of skipped, changed and split documents.

    Args:
        shards: The result of `writer.write`.

    Raises:
        ValueError: Files of the corpus changed during preparation, or a split has no document.
    """
    if changed := corpus.changed():
        raise ValueError(f"data.paths: {shorten(changed)} changed during preparation; start again")
    skipped, documents = writer.describe_skipped(), writer.state.documents
    if not documents:
        raise corpus.no_documents_error(skipped)
    if skipped:
        logger.warning("skipped documents: %s", skipped)
    if writer.state.changed:
        logger.warning(
            "the tokenizer changes %d of %s: the tokens decode to another text",
            *(writer.state.changed, counted(documents, "document")),
        )
    read_files = len(corpus.files) - sum(writer.state.skipped_counts.values())
    if corpus.is_text and documents > read_files:
        logger.info(
            "files longer than %d characters were split: %s gave %s in total",
            *(PART_CHARS, counted(read_files, "file"), counted(documents, "document")),
        )
    if empty := [split for split, entries in shards.items() if not sum(entry["documents"] for entry in entries)]:
        raise ValueError(
            f"data.validation_share: of {counted(documents, 'document')}, none is left for {' and '.join(empty)}; "
            "change it, or set data.validation_paths"
        )


def write_manifest(plan: PreparationPlan, writer: CorpusWriter, tokenizer: Tokenizer, shards: Shards) -> None:
    """Write manifest.json into the plan's work folder. The folder is complete when it has this file.

    Args:
        shards: The result of `writer.write`.
    """
    checksums = [file["sha256"] for entries in shards.values() for entry in entries for file in entry["files"].values()]
    state = writer.state
    manifest = {
        "format": FORMAT,
        "fingerprint": hash_of(tokenizer.sha256, checksums),
        "identity": plan.identity,
        **({"validation_files": plan.validation_files} if plan.validation_files else {}),
        "settings": asdict(plan.settings),
        "corpus": {
            "sha256": state.chain,
            "documents": state.documents,
            "bytes": state.bytes,
            "skipped": state.skipped,
            "skipped_counts": state.skipped_counts,
            **({"changed": state.changed} if state.changed else {}),
        },
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, **tokenizer.special},
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "splits": {
            split: {**{key: sum(entry[key] for entry in entries) for key in COUNTS}, "shards": entries}
            for split, entries in shards.items()
        },
    }
    write_atomic(plan.work_folder / MANIFEST, json.dumps(manifest, indent=1))


def put_in_place(plan: PreparationPlan) -> Path:
    """Delete the temporary files of the plan's complete work folder, and rename the folder to its final name.

    If a folder of that name exists, it has the same tokens, and the work folder is deleted instead.

    Returns:
        The final folder.
    """
    work = plan.work_folder
    manifest = json.loads((work / MANIFEST).read_text())
    folder = plan.folder(manifest["corpus"]["sha256"])
    if folder.exists():
        logger.info("%s already contains the same tokens: using it, and deleting the new copy", folder)
        mark(plan, folder)
        remove(work)
        return folder
    splits = manifest["splits"].values()
    keep = {name for split in splits for shard in split["shards"] for name in shard["files"]}
    keep |= {MANIFEST, SPECIAL, getattr(find_tokenizer(work), "name", "")}
    for file in work.iterdir():
        if file.name not in keep:
            with suppress(OSError):  # a network file system keeps a deleted but open file under another name
                file.unlink()
    mark(plan, work)  # before the rename, so that the folder can be found as soon as it has its name
    os.replace(work, folder)
    logger.info("prepared %s", describe(manifest, folder))
    return folder


def mark(plan: PreparationPlan, folder: Path) -> None:
    """Mark `folder` as the preparation of the plan's files. Without the mark, the next call reads the corpus again.

    If the mark cannot be written, a warning is logged.
    """
    try:
        (folder / plan.marker).touch()
    except OSError as error:
        logger.warning("%s could not be marked as the preparation of these files: %s", folder, error)


def remove(work: Path) -> None:
    """Remove a work folder. Files that cannot be deleted stay, and do no harm."""
    shutil.rmtree(work, ignore_errors=True)
