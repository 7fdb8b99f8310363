"""A corpus to be prepared: its records in order, from any place on, and which split a document is for."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.settings import LINES, DataSettings
from data.sources.documents import PAIR, Batch, Document, Parser, Record, digest
from data.sources.files import SourceFile, shorten
from data.sources.huggingface import Rows
from data.sources.records import PART_CHARS, Records
from data.sources.token_files import TokenRecords
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BATCH_CHARS, BATCH_RECORDS = 2**20, 2**14
SURVEY_BYTES = 2**26  # of text in the files that are read once more beforehand, for what they hold
SAMPLE_BYTES = 2**30  # of the files at the most that are read for a tokenizer's sample


class Corpus:
    """The files of `settings`, or the rows of their dataset.

    `sha256` is a hash of all names and texts, known beforehand (by reading everything) of small corpora alone.
    Raises ValueError for a small corpus that holds no text, or no document for one of the splits.
    """

    def __init__(self, files: list[SourceFile], settings: DataSettings, survey: bool = True) -> None:
        self.files, self._settings = sorted(files, key=_held_out_first), settings
        self.parse = Parser(settings.column, pairs=settings.source == "instructions")
        self.total_bytes = sum(file.size for file in files)
        self.text_bytes = sum(map(_text_bytes, files))
        self.own_validation = any(file.held_out for file in files)
        self.sha256: str | None = None
        self._threshold = settings.validation_share
        if survey and files and self.text_bytes <= SURVEY_BYTES:
            self._survey()

    @property
    def is_text(self) -> bool:
        return self._settings.source not in (*LINES, "datasets", "tokens")

    def records(self, start: tuple[int, int] = (0, 0)) -> Any:
        """The records behind `start`, as in ``data.records.Records``."""
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
        """The records behind `start` some at a time."""
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
        """The documents of `files`, or of the dataset; of a large corpus a part alone, files in the order of a hash."""
        if self.total_bytes > SAMPLE_BYTES:
            files = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        records = self._records(files) if files else self.records()
        read = 0
        for document in map(self.parse, records):
            if isinstance(document, Document):
                yield document
                read += len(document.text)
            if read > SAMPLE_BYTES:
                break

    def training_texts(self) -> Iterator[str]:
        """The texts of those ``documents`` that are for training."""
        files = [file for file in self.files if not file.held_out]
        for document in self.documents(files):
            if self.own_validation or not self._is_drawn(digest(document)):
                yield document.text

    def is_held_out(self, file: int, content: bytes) -> bool:
        """Whether a document of the `file`th file with the digest `content` is for validation."""
        return self.files[file].held_out if self.own_validation else self._is_drawn(content)

    def require_pair(self, record: Record, problem: str) -> None:
        """Raises ValueError for a line of instructions that is none: mended rather than left out."""
        if problem == PAIR:
            raise ValueError(
                f"data.paths: {self.files[record.file].path}, line {record.number}: is {PAIR}; mend that line"
            )

    def nothing(self, skipped: str) -> ValueError:
        """What is wrong with a corpus without any document."""
        what = f"none of {len(self.files)} files is readable text in UTF-8" if self.is_text else "no document was found"
        column = "" if self.is_text else " and data.column"
        return ValueError(f"data.paths: {what}{f' ({skipped})' if skipped else ''}; check data.paths{column}")

    def changed(self) -> list[str]:
        """The files that are not what they were when they were listed."""
        return [file.name for file in self.files if _stat(file) != (file.size, file.mtime)]

    def _is_drawn(self, content: bytes) -> bool:
        """Held out by its number in [0, 1), which depends on the text alone: an added or renamed file moves no other
        one between the splits, and two documents with the same text never stand on both sides.
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
                    continue  # as in data.write
                chain = extended(chain, document.name, content)
                draws.add(self._draw(content))
        if not chain:
            raise self.nothing("; ".join(f"{len(names)} {why} ({shorten(names)})" for why, names in reasons.items()))
        if not self.own_validation:
            self._threshold = _threshold(draws, self._settings.validation_share)
        self.sha256 = chain


def _text_bytes(file: SourceFile) -> int:
    """About how many bytes of text a file holds."""
    return file.size * 4 if file.name.endswith((".gz", ".zst", ".parquet")) else file.size


def extended(chain: str, name: str, content: bytes) -> str:
    """The hash of a row of documents and one more, of that name and with that digest."""
    return hashlib.sha256(chain.encode() + hashlib.sha256(name.encode()).digest() + content).hexdigest()


def _held_out_first(file: SourceFile) -> tuple[bool, str]:
    return not file.held_out, file.name


def _stat(file: SourceFile) -> tuple[int, int] | None:
    try:
        stat = file.path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _threshold(draws: set[float], share: float) -> float:
    """`share`, moved where it would leave a split without any document."""
    if len(draws) < 2:
        raise ValueError(
            "data.paths: holds one document only, and validation needs another; add a file "
            f"(those longer than {PART_CHARS} characters are cut into several documents)"
        )
    return min(max(share, float(np.nextafter(min(draws), 1))), max(draws))
