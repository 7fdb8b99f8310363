"""Documents from token files written by another program. Every eos token ends a document.

A file is `.npy`, or contains only little-endian tokens of dtype `data.token_dtype`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data.shards.array_file import ArrayFile
from data.sources.documents import Record
from data.sources.files import SourceFile
from data.sources.open_text import reason
from data.tokenizer import Tokenizer

CHUNK = 2**22  # tokens read at a time
LONGEST = 2**20  # tokens per document; longer documents are split


class TokenRecords:
    """Iterates over the documents as records whose content is int32 (n,), without bos and eos.

    Args:
        dtype: The dtype of the tokens in files other than .npy.
        tokenizer: The tokenizer that made the tokens.
        start: (file, number of its documents to skip). Earlier files are skipped too.

    Raises:
        ValueError: A file is not an array of tokens, or has a token that `tokenizer` lacks. The message names the file.
    """

    def __init__(
        self, files: Sequence[SourceFile], dtype: str, tokenizer: Tokenizer, start: tuple[int, int] = (0, 0)
    ) -> None:
        self._files, self._dtype, self._tokenizer, self._start = files, np.dtype(dtype), tokenizer, start
        self.done_bytes = sum(file.size for file in files[: start[0]])

    def __iter__(self) -> Iterator[Record]:
        first, done = self._start
        for number, file in enumerate(self._files[first:], start=first):
            before = self.done_bytes
            for count, ids in enumerate(self._documents(file), start=1):
                if count > (done if number == first else 0):
                    self.done_bytes = min(self.done_bytes + len(ids) * self._dtype.itemsize, before + file.size)
                    yield Record(number, count, f"{file.name}#{count}", ids)
            self.done_bytes = before + file.size

    def _documents(self, file: SourceFile) -> Iterator[np.ndarray]:
        tokens, rest = self._open(file), np.empty(0, np.int32)
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            if (found := int(chunk.max())) >= self._tokenizer.vocab_size or chunk.min() < 0:
                raise ValueError(
                    f"data.paths: {file.path} holds token {found if chunk.min() >= 0 else int(chunk.min())}, which "
                    f"{self._tokenizer.path} does not have; check data.tokenizer and data.token_dtype"
                )
            ids = np.concatenate([rest, chunk.astype(np.int32)])
            *complete, rest = np.split(ids, np.flatnonzero(ids == self._tokenizer.eos_id) + 1)
            for document in [*complete, *(np.split(rest, range(LONGEST, len(rest), LONGEST))[:-1])]:
                yield from self._without_special(document)
            rest = rest[(len(rest) - 1) // LONGEST * LONGEST :] if len(rest) else rest
        yield from self._without_special(rest)

    def _without_special(self, document: np.ndarray) -> Iterator[np.ndarray]:
        """A document without bos and eos, in pieces of at most LONGEST tokens; nothing for an empty one."""
        document = document[~np.isin(document, (self._tokenizer.bos_id, self._tokenizer.eos_id))]
        for start in range(0, len(document), LONGEST):
            yield document[start : start + LONGEST]

    def _open(self, file: SourceFile) -> ArrayFile:
        is_raw = not file.name.endswith(".npy")
        try:
            tokens = ArrayFile(file.path, self._dtype.newbyteorder("<")) if is_raw else ArrayFile.npy(file.path)
            if len(tokens) and tokens.dtype.kind not in "iu":
                raise ValueError(f"{tokens.dtype} is not an integer type")
        except Exception as error:  # numpy evaluates the header of an array as Python code, and raises any exception
            fix = "check data.token_dtype" if is_raw else "save a one-dimensional array of integers with numpy.save"
            raise ValueError(f"data.paths: {file.path} is not an array of tokens ({reason(error)}); {fix}") from None
        return tokens
