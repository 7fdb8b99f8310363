"""The records of files in order, each with its position, so that reading can resume after any record.

A record becomes at most one document: a text or a part of a text, a line of JSON, a row of a table. Memory is bounded
for files of any size: it holds one line, one batch of rows, or a few megabytes of text at a time.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data.sources.documents import Document, Record
from data.sources.files import SourceFile
from data.sources.open_text import COMPRESSED, READ_ERRORS, TextFile, reason
from data.sources.parquet import ParquetRows
from data.text_encoding import UNDECODABLE

PART_CHARS = 2**16  # longer texts are split into several documents
MAX_LINE_BYTES = 2**26
CHUNK_BYTES = 2**22
PARQUET = ".parquet"


class Records:
    """Iterates over the records of `files`. A text that cannot be read is a record without content.

    `done_bytes` is the approximate number of bytes read so far.

    Args:
        column: The column with the texts of Parquet files (`.parquet`) or JSON lines (all others). None: the files are
            texts.
        part_chars: Texts are split into parts of at most this number of characters; None: not split.
        start: (file, number of its records to skip). Earlier files are skipped too.

    Raises:
        ValueError: A Parquet or JSON lines file is truncated or damaged. The message names the file.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        column: str | None,
        part_chars: int | None = None,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self._files, self._column, self._part_chars, self._start = files, column, part_chars, start
        self._earlier_bytes = 0
        self._place: Callable[[], int] = lambda: 0

    @property
    def done_bytes(self) -> int:
        return self._earlier_bytes + self._place()

    def __iter__(self) -> Iterator[Record]:
        first, done = self._start
        self._earlier_bytes = sum(file.size for file in self._files[:first])
        for number, file in enumerate(self._files[first:], start=first):
            yield from self._of(number, file, done if number == first else 0)
            self._place, self._earlier_bytes = (lambda: 0), self._earlier_bytes + file.size

    def _of(self, number: int, file: SourceFile, done: int) -> Iterator[Record]:
        if self._column is None:
            records = text_records(number, file, self._part_chars)
            return (record for record in records if record.number > done)
        if file.name.endswith(PARQUET):
            rows = ParquetRows(number, file, self._column, done)
            self._place = rows.place
            return iter(rows)
        return self._json_lines(number, file, done)

    def _json_lines(self, file_number: int, file: SourceFile, done: int) -> Iterator[Record]:
        number = 0
        try:
            with TextFile(file.path) as stream:
                self._place = stream.place
                if stream.problem and not done:
                    yield Record(file_number, 1, f"{file.name}#1", None, stream.problem)
                while not stream.problem and (line := stream.readline(MAX_LINE_BYTES)):
                    number += 1
                    problem = f"not {stream.encoding}" if stream.encoding != "UTF-8" and UNDECODABLE in line else ""
                    while not line.endswith(b"\n") and (rest := stream.readline(MAX_LINE_BYTES)):
                        problem, line = f"longer than {MAX_LINE_BYTES} bytes", rest
                    if number > done and (problem or not line.isspace()):
                        yield Record(file_number, number, f"{file.name}#{number}", None if problem else line, problem)
        except PermissionError:
            raise ValueError(f"data.paths: {file.path} cannot be read (permission denied); make it readable") from None
        except READ_ERRORS as error:
            raise ValueError(
                f"data.paths: {file.path} cannot be read after line {number} ({reason(error)}); replace it with a "
                "complete copy (before `git lfs pull`, a git lfs file is a pointer of a few lines)"
            ) from None


class _NoTextError(Exception):
    """The reason why a file is not text."""


def text_records(number: int, file: SourceFile, part_chars: int | None) -> Iterator[Record]:
    """Yield a text file as records of at most `part_chars` characters, split after line ends where possible.

    A file that is empty, or has a part that is not text or cannot be read, yields one record without content, whose
    `problem` is the reason.

    Args:
        number: The file's number in the corpus.
        part_chars: None yields the complete file as one record.

    Raises:
        ValueError: The file changes while it is read.
    """
    try:
        if file.size > CHUNK_BYTES or file.name.endswith(COMPRESSED):
            for _ in _pieces(file.path):  # check the complete file before any part of it is used
                pass
        parts = _parts(_pieces(file.path), part_chars)
        first, second = next(parts, ""), next(parts, "")
    except _NoTextError as error:
        yield Record(number, 1, file.name, None, str(error))
        return
    if not second:
        yield Record(number, 1, file.name, first or None, "" if first else "empty")
        return
    for part, text in enumerate((first, second), start=1):
        yield Record(number, part, f"{file.name}#{part}", text)
    try:
        for part, text in enumerate(parts, start=3):
            yield Record(number, part, f"{file.name}#{part}", text)
    except _NoTextError:
        raise ValueError(f"data.paths: {file.path} changed while it was being read; start again") from None


def read_documents(
    files: Iterable[SourceFile], skipped: dict[str, list[str]], part_chars: int | None = None
) -> Iterator[Document]:
    """Yield the texts of the files, with their line ends unchanged.

    The name of each skipped file is added to `skipped[reason]`. Texts longer than `part_chars` characters are split
    into documents `name#1`, `name#2`, …; None splits no text.
    """
    for number, file in enumerate(files):
        for record in text_records(number, file, part_chars):
            if record.content is None:
                skipped.setdefault(record.problem, []).append(record.name)
            else:
                yield Document(record.name, str(record.content))


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, some megabytes at a time. Raises _NoTextError."""
    decode, encoding = codecs.getincrementaldecoder("utf-8")().decode, "UTF-8"
    try:
        with TextFile(path) as file:
            encoding = file.encoding
            if file.problem:
                raise _NoTextError(file.problem)
            while piece := file.read(CHUNK_BYTES):
                yield decode(piece)
        yield decode(b"", final=True)
    except UnicodeDecodeError:
        raise _NoTextError(f"not {encoding}") from None
    except READ_ERRORS as error:
        raise _NoTextError(reason(error)) from None


def _parts(pieces: Iterable[str], size: int | None) -> Iterator[str]:
    """The text of `pieces` in parts of at most `size` characters, split after line ends where possible."""
    if size is None:
        yield "".join(pieces)
        return
    text = ""
    for piece in pieces:
        text, start = text + piece, 0
        while len(text) - start > size:
            end = text.rfind("\n", start, start + size) + 1 or start + size
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text
