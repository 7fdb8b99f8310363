"""Reuse an interrupted preparation when its leading input files are unchanged.

A file that cannot be read ends a preparation. After that file is replaced or removed, the list of files differs, and so
does the name of the work folder. The files before the broken file and their tokens are still the same, so the new
preparation renames the old work folder and resumes after these files.
"""

import json
import logging
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from data.atomic import write_atomic
from data.preparation.corpus_writer import STATE, WriterState, read_state, write_state
from data.preparation.plan import PreparationPlan
from data.sources.corpus import Corpus
from data.sources.files import size_and_time
from data.token_dataset import FILES, MANIFEST
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

OLD_TOKENIZER, OLD_STATE = "tokenizer.before", "state.before"
"""The tokenizer and state of a reused preparation, until training on the new files has given the same tokenizer."""
HEX16 = 16 * "[0-9a-f]"


class ResumableError(ValueError):
    """A file cannot be read. The work folder is kept, with the tokens of the files before this file."""


def resumable(error: ValueError, work: Path) -> ValueError:
    """`error` as a ResumableError that names the work folder `work`; `error` itself if nothing can be resumed."""
    if not (work / STATE).exists() or not (work / FILES).exists():
        return error
    return ResumableError(
        f"{error}, or remove that file\n"
        f"{work} keeps the tokens of the files before it, and the same command resumes from there"
    )


def make_work_folder(plan: PreparationPlan, corpus: Corpus) -> None:
    """Create the work folder of a plan. If possible, reuse an interrupted preparation of the same leading files."""
    work = plan.work_folder
    if corpus.is_text or plan.settings.source == "datasets":  # broken files are skipped, or there are no files
        work.mkdir(exist_ok=True)
        return
    files = [[f.name, str(f.path), f.size, f.mtime, f.held_out] for f in corpus.files]
    inputs = json.loads(json.dumps({"identity": plan.identity, "files": files}))  # in the form read from a file
    if not work.exists():
        _take_over(work, inputs)
    work.mkdir(exist_ok=True)
    write_atomic(work / FILES, json.dumps(inputs))


def _take_over(work: Path, inputs: dict[str, Any]) -> None:
    """Rename the interrupted preparation with the most reusable documents to `work`, if there is one."""
    pattern = f"{work.name.rpartition('-')[0]}-{HEX16}.tmp"
    candidates = [found for folder in work.parent.glob(pattern) if (found := _reusable(folder, inputs))]
    if not candidates:
        return
    documents, same_files, folder, state = max(candidates, key=lambda found: found[:2])
    write_state(folder / STATE, state)
    if inputs["identity"]["tokenizer"] is None:
        os.replace(folder / STATE, folder / OLD_STATE)
        os.replace(folder / "tokenizer.model", folder / OLD_TOKENIZER)
    os.replace(folder, work)
    logger.info("the first %d files are the same as in %s: reusing its %d documents", same_files, folder, documents)


def _reusable(folder: Path, inputs: dict[str, Any]) -> tuple[int, int, Path, WriterState] | None:
    """The interrupted preparation in `folder`, up to the last leading file that `inputs` has too, if it can be reused.

    Returns the number of its documents, the number of these files, `folder` and the state after their last document.
    """
    try:
        old = json.loads((folder / FILES).read_text())
        identity, files = dict(old["identity"]), list(old["files"])
        if all(size_and_time(path) == (size, mtime) for _, path, size, mtime, _ in files):
            return None  # the command that started it can still resume it
    except (OSError, ValueError, KeyError, TypeError):
        return None
    pairs = zip(files, inputs["files"], strict=False)
    same_files = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    state = read_state(folder / STATE)
    if state.place[0] >= same_files and state.earlier:
        state = WriterState(**state.earlier)
    complete = (folder / MANIFEST).exists()
    if complete or identity != inputs["identity"] or not state.documents or state.place[0] >= same_files:
        return None
    return state.documents, same_files, folder, state


def confirm_tokenizer(work: Path, tokenizer: Tokenizer) -> None:
    """Discard reused documents if `tokenizer`, trained on the current files, differs from the earlier tokenizer."""
    old_tokenizer, old_state = work / OLD_TOKENIZER, work / OLD_STATE
    if old_tokenizer.exists() and old_state.exists():
        if old_tokenizer.read_bytes() == tokenizer.path.read_bytes():
            os.replace(old_state, work / STATE)
        else:
            logger.warning("the tokenizer of the current files differs from the earlier one; preparing from the start")
            old_state.unlink()
    old_tokenizer.unlink(missing_ok=True)
