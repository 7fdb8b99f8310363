"""A corpus to prepare: its records in order, from any record on, and the split of each document."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.settings import LINES, DataSettings
from data.sources.documents import NO_RESPONSE, Batch, Document, Record, digest
from data.sources.file_search import shorten
from data.sources.files import SourceFile, size_and_time
from data.sources.huggingface import Rows
from data.sources.open_text import COMPRESSED
from data.sources.parse_record import Parser
from data.sources.records import PARQUET, PART_CHARS, Records
from data.sources.token_files import TokenRecords
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH_CHARS, BATCH_RECORDS = 2**20, 2**14
SURVEY_BYTES = 2**26  # corpora of at most this much text are read once before they are prepared
SAMPLE_BYTES = 2**30  # maximum text to read for the sample that trains a tokenizer


class Corpus:
    """The text of `files`, or for source `datasets` of the rows of `settings.dataset`, and its splits.

    Args:
        files: The files of the corpus, as from `data.checks.examine`; empty for a dataset on the hub.
        settings: The settings of the corpus.
        survey: Whether to read a corpus of at most 64 MiB of text once now, so that both splits get a document.

    Raises:
        ValueError: The survey finds no text, too few documents for two splits, or a file or line that cannot be read;
            or instructions are in Parquet.

    Attributes:
        sha256: After a survey, the hash of the names and texts of all documents, 64 hex digits; else None.
        files: The files of the corpus: validation files first, then by name.
        parse: Converts a record into a document.
        total_bytes: The size of the files.
        text_bytes: An estimate of the bytes of their text after decompression.
        own_validation: Whether the corpus has separate validation files.
    """

    def __init__(self, files: list[SourceFile], settings: DataSettings, survey: bool = True) -> None:
        self.files, self._settings = sorted(files, key=_held_out_first), settings
        self.parse = Parser(settings.column, pairs=settings.source == "instructions")
        self.total_bytes = sum(file.size for file in files)
        self.text_bytes = sum(map(_text_bytes, files))
        self.own_validation = any(file.held_out for file in files)
        if self.parse.pairs and (tables := [str(file.path) for file in files if file.name.endswith(PARQUET)]):
            raise ValueError(
                f"data.paths: data=instructions reads JSON lines, not Parquet; convert {shorten(tables)} to .jsonl"
            )
        self._key = "data.dataset" if settings.source == "datasets" else "data.paths"
        self.sha256: str | None = None
        self._threshold = settings.validation_share
        if survey and files and self.text_bytes <= SURVEY_BYTES:
            self._survey()

    @property
    def is_text(self) -> bool:
        return self._settings.source not in (*LINES, "datasets", "tokens")

    def records(self, start: tuple[int, int] = (0, 0)) -> Any:
        """An iterable of the records, without those before `start` = (file, number of its records to skip).

        Its `done_bytes` is the approximate number of bytes read so far.
        """
        s = self._settings
        if s.source == "datasets":
            return Rows(s, start[1])
        if s.source == "tokens":
            return TokenRecords(self.files, s.token_dtype, Tokenizer(str(s.tokenizer), s.bos, s.eos), start)
        return self._records(self.files, start)

    def _records(self, files: list[SourceFile], start: tuple[int, int] = (0, 0)) -> Records:
        column = None if self.is_text else self._settings.column
        return Records(files, column, PART_CHARS if self._settings.source == "text" else None, start)

    def batches(self, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """The records, as from ``records``, in batches of about a million characters and at most 16,384 records."""
        records, batch, size = self.records(start), [], 0
        for record in records:
            batch.append(record)
            size += 0 if record.content is None else len(record.content)
            if size >= BATCH_CHARS or len(batch) >= BATCH_RECORDS:
                yield Batch(batch, records.done_bytes)
                batch, size = [], 0
        if batch:
            yield Batch(batch, records.done_bytes)

    def documents(self, files: list[SourceFile]) -> Iterator[Document]:
        """The documents of `files`, up to about 2^30 characters (SAMPLE_BYTES).

        The files of a larger corpus come in the order of a hash of their names, so that the documents are a sample. For
        source `datasets`, `files` is ignored, and the rows of the dataset come in their order.
        """
        if self.total_bytes > SAMPLE_BYTES:
            files = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        records = self.records() if self._settings.source == "datasets" else self._records(files)
        read = 0
        for document in map(self.parse, records):
            if isinstance(document, Document):
                yield document
                read += len(document.text)
            if read > SAMPLE_BYTES:
                break

    def training_texts(self) -> Iterator[str]:
        """The texts of the training split, with the limit and order of ``documents``."""
        files = [file for file in self.files if not file.held_out]
        for document in self.documents(files):
            if self.own_validation or not self._is_drawn(digest(document)):
                yield document.text

    def is_held_out(self, file: int, content: bytes) -> bool:
        """Whether a document of file number `file` with the digest `content` is for validation."""
        return self.files[file].held_out if self.own_validation else self._is_drawn(content)

    def require_pair(self, record: Record, problem: str) -> None:
        """Raise ValueError if `record` is a broken line of instructions: unlike other records, it is not skipped.

        `problem` is the reason why there is no document. A line without a response is not broken.
        """
        if self.parse.pairs and problem != NO_RESPONSE:
            raise ValueError(
                f"data.paths: line {record.number} of {self.files[record.file].path} is {problem}; fix that line"
            )

    def no_documents_error(self, skipped: str) -> ValueError:
        """The error of a corpus without any document. `skipped` says why records were skipped; it may be empty."""
        s = self._settings
        found = f"no document was found{f' in {s.dataset}' if s.dataset else ''}"
        problem = f"none of {len(self.files)} files is readable text" if self.is_text else found
        key, column = self._key, "" if self.is_text else " and data.column"
        return ValueError(f"{key}: {problem}{f' ({skipped})' if skipped else ''}; check {key}{column}")

    def changed(self) -> list[str]:
        """The names of files whose size or modification time has changed since they were listed."""
        return [file.name for file in self.files if size_and_time(file.path) != (file.size, file.mtime)]

    def _is_drawn(self, content: bytes) -> bool:
        """Whether a document is held out: whether its number in [0, 1) is below the share to hold out.

        The number depends only on the seed and the document's digest: adding or renaming a file moves no other document
        to another split, and documents with the same text are in the same split.
        """
        return self._draw(content) < self._threshold

    def _draw(self, content: bytes) -> float:
        drawn = hashlib.sha256(f"{self._settings.seed} validation ".encode() + content).digest()
        return int.from_bytes(drawn[:6], "big") / 2**48

    def _survey(self) -> None:
        chain, draws, held_out, reasons = "", set(), set(), dict[str, list[str]]()
        for record in self.records():
            document = self.parse(record)
            if isinstance(document, str):
                self.require_pair(record, document)
                reasons.setdefault(document, []).append(record.name)
            else:
                content = digest(document)
                if self.files[record.file].held_out:
                    held_out.add(content)
                elif content in held_out:
                    continue  # as in CorpusWriter
                chain = extended(chain, document.name, content)
                draws.add(self._draw(content))
        if not chain:
            skipped = "; ".join(f"{len(names)} {why} ({shorten(names)})" for why, names in reasons.items())
            raise self.no_documents_error(skipped)
        if not self.own_validation:
            self._threshold = _threshold(draws, self._settings.validation_share, self._key)
        self.sha256 = chain


def _text_bytes(file: SourceFile) -> int:
    """An estimate of the bytes of text in a file."""
    return file.size * 4 if file.name.endswith((*COMPRESSED, PARQUET)) else file.size


def extended(chain: str, name: str, content: bytes) -> str:
    """The hash of a sequence of documents after another document is appended: SHA-256, 64 hex digits.

    Args:
        chain: The hash of the documents so far; "" if there are none.
        name: The name of the appended document.
        content: The ``digest`` of the appended document.
    """
    return hashlib.sha256(chain.encode() + hashlib.sha256(name.encode()).digest() + content).hexdigest()


def _held_out_first(file: SourceFile) -> tuple[bool, str]:
    return not file.held_out, file.name


def _threshold(draws: set[float], share: float, key: str) -> float:
    """`share`, changed as little as possible so that both splits get a document.

    Raises:
        ValueError: There is a single document; the message names `key`.
    """
    if len(draws) < 2:
        raise ValueError(
            f"{key}: has only one document, and validation needs a second; add a file "
            f"(files longer than {PART_CHARS} characters are split into several documents)"
        )
    return min(max(share, float(np.nextafter(min(draws), 1))), max(draws))
