"""What a preparation that did not end has left, as the beginning of one whose files are others further on.

A file that cannot be read ends a preparation, and what was written of the files before it stays. When that file is
mended or taken away, the list of files is another, and so is the preparation; but its first files are the same, and so
are their tokens.
"""

import json
import logging
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from data.preparation.corpus_writer import STATE, State, read_state, write_state
from data.sources.corpus import Corpus
from data.token_dataset import FILES, MANIFEST
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
TOKENIZER, HELD = "tokenizer.before", "state.before"  # what was taken over, until it is known to be of any use
HEX16 = 16 * "[0-9a-f]"


class Kept(ValueError):
    """What is wrong with a file of a preparation, of which that stays which was made of the files before."""


def kept(error: ValueError, work: Path) -> ValueError:
    """`error`, and what there is to go on with, if there is anything."""
    if not (work / STATE).exists() or not (work / FILES).exists():
        return error
    return Kept(
        f"{error}; or take the file away: {work} keeps what was made of the files before it, and the same command goes "
        "on with that"
    )


def begin(work: Path, identity: dict[str, Any], corpus: Corpus) -> None:
    """Make the folder of a preparation of this corpus, of what another has left if there is such a one."""
    if corpus.is_text or identity["source"] == "datasets":  # no broken file ends it, or none is known
        work.mkdir(exist_ok=True)
        return
    files = [[f.name, str(f.path), f.size, f.mtime, f.held_out] for f in corpus.files]
    ours = json.loads(json.dumps({"identity": identity, "files": files}))
    if not work.exists():
        _take_over(work, ours)
    work.mkdir(exist_ok=True)
    (work / FILES).write_text(json.dumps(ours))


def _take_over(work: Path, ours: dict[str, Any]) -> None:
    found = []
    for folder in work.parent.glob(f"{work.name.rpartition('-')[0]}-{HEX16}.tmp"):
        try:
            theirs = json.loads((folder / FILES).read_text())
            theirs = {"identity": dict(theirs["identity"]), "files": list(theirs["files"])}
            if all(_stat(path) == (size, mtime) for _, path, size, mtime, _ in theirs["files"]):
                continue  # it can be gone on with itself
        except (OSError, ValueError, KeyError, TypeError):
            continue
        pairs = zip(theirs["files"], ours["files"], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        state = read_state(folder / STATE)
        if state.place[0] >= same and state.earlier:
            state = State(**state.earlier)
        whole = (folder / MANIFEST).exists()  # and with another text behind
        if not whole and theirs["identity"] == ours["identity"] and state.documents and state.place[0] < same:
            found.append((state.documents, same, folder, state))
    if not found:
        return
    documents, same, folder, state = max(found, key=lambda entry: entry[:2])
    write_state(folder / STATE, state)
    if ours["identity"]["tokenizer"] is None:
        os.replace(folder / STATE, folder / HELD)
        os.replace(folder / "tokenizer.model", folder / TOKENIZER)
    os.replace(folder, work)
    logger.info(
        "the first %d files are as %s had them: going on with its %d documents of these", same, folder, documents
    )


def _stat(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def release(work: Path, tokenizer: Tokenizer) -> None:
    """Go on with what was taken over if the tokenizer, trained on the files as they are now, is the one it is of."""
    before, held = work / TOKENIZER, work / HELD
    if before.exists() and held.exists():
        if before.read_bytes() == tokenizer.path.read_bytes():
            os.replace(held, work / STATE)
        else:
            logger.warning("the tokenizer trained on these files is another one; preparing from the start")
            held.unlink()
    before.unlink(missing_ok=True)
