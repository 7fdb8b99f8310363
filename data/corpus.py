"""A corpus to be prepared: its files read once for what they hold, then document by document with their split."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import zip_longest

import numpy as np

from data.c4 import is_validation, read_c4
from data.instructions import read_instructions
from data.settings import DataSettings
from data.sources import Document, SourceFile, read_documents, shorten

logger = logging.getLogger(__name__)

PART_CHARS = 2**16


class Corpus:
    """Reads all files and logs which were skipped; `sha256` is a hash of all names and texts.

    Raises ValueError if nothing is readable, or if there is no document for one of the splits.
    """

    def __init__(self, files: list[SourceFile], settings: DataSettings) -> None:
        self._files, self._seed = files, settings.seed
        self._source, self._part_chars = settings.source, PART_CHARS if settings.source == "text" else None
        self.skipped: dict[str, list[str]] = {}
        self._digests: list[bytes] = []
        self.text_bytes = 0
        corpus = hashlib.sha256()
        for document in self._read(self.skipped):
            self._digests.append(_digest(document))
            corpus.update(hashlib.sha256(document.name.encode()).digest() + self._digests[-1])
            self.text_bytes += len(document.text.encode())
        self.sha256 = corpus.hexdigest()
        self._log()
        if not self._digests:
            raise ValueError(f"data.paths: none of {len(files)} files is readable text in UTF-8; check data.paths")
        self._threshold = _threshold({self._draw(d) for d in self._digests}, settings.validation_share)

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def has_prompts(self) -> bool:
        """Whether the documents are prompts with responses, rather than texts."""
        return self._source == "instructions"

    def documents(self) -> Iterator[tuple[Document, str]]:
        """Every document and its split, `train` or `val`. Raises ValueError if the files are not what they were."""
        for document, digest in zip_longest(self._read({}), self._digests):
            if document is None or _digest(document) != digest:
                name = document.name if document else "a file"
                raise ValueError(f"data.paths: {name} changed while it was being read; start again")
            yield document, "val" if self._is_held_out(document, digest) else "train"

    def _read(self, skipped: dict[str, list[str]]) -> Iterator[Document]:
        if self.has_prompts:
            return read_instructions(self._files, skipped)
        if self._source == "c4":
            return read_c4(self._files)
        return read_documents(self._files, skipped, self._part_chars)

    def _log(self) -> None:
        if self.skipped:
            reasons = (f"{len(names)} {reason} ({shorten(names)})" for reason, names in self.skipped.items())
            logger.info("skipped files: %s", "; ".join(reasons))
        whole = len(self._files) - sum(map(len, self.skipped.values()))
        if self._part_chars and len(self) > whole:
            logger.info("cut files longer than %d characters: %d documents of %d files", PART_CHARS, len(self), whole)

    def _is_held_out(self, document: Document, digest: bytes) -> bool:
        return is_validation(document.name) if self._source == "c4" else self._draw(digest) < self._threshold

    def _draw(self, digest: bytes) -> float:
        """A document's number in [0, 1): below the threshold it is for validation.

        It depends on the text alone: an added or renamed file moves no other one between the splits, and two
        documents with the same text never stand on both sides.
        """
        drawn = hashlib.sha256(f"{self._seed} validation ".encode() + digest).digest()
        return int.from_bytes(drawn[:6], "big") / 2**48


def _digest(document: Document) -> bytes:
    prompt = f"\0{document.given}" if document.given else ""
    return hashlib.sha256((document.text + prompt).encode()).digest()


def _threshold(draws: set[float], share: float) -> float:
    """`share`, moved where it would leave a split without any document."""
    if len(draws) < 2:
        raise ValueError(
            "data.paths: holds one document only, and validation needs another; add a file "
            f"(those longer than {PART_CHARS} characters are cut into several documents)"
        )
    return min(max(share, float(np.nextafter(min(draws), 1))), max(draws))
