"""Tokens that another program wrote, one file of them or many: their documents, cut behind every eos.

A file is `.npy`, which says its type, or holds nothing but tokens, little-endian, of `data.token_dtype`.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data.shards.array_file import ArrayFile
from data.sources.documents import Record
from data.sources.files import SourceFile
from data.tokenizer import Tokenizer

CHUNK = 2**22
LONGEST = 2**20  # tokens of a document; what is longer becomes several


class TokenRecords:
    """Iterates over the documents behind `start` as records, whose content is int32 (n,) without bos and eos.

    Raises ValueError for a file that is no array of tokens, or holds one that the tokenizer does not have.
    """

    def __init__(
        self, files: Sequence[SourceFile], dtype: str, tokenizer: Tokenizer, start: tuple[int, int] = (0, 0)
    ) -> None:
        self._files, self._dtype, self._tokenizer, self._start = files, np.dtype(dtype), tokenizer, start
        self.done_bytes = sum(file.size for file in files[: start[0]])

    def __iter__(self) -> Iterator[Record]:
        first, done = self._start
        for number, file in enumerate(self._files[first:], start=first):
            behind = self.done_bytes
            for count, ids in enumerate(self._documents(file), start=1):
                if count > (done if number == first else 0):
                    self.done_bytes = min(self.done_bytes + len(ids) * self._dtype.itemsize, behind + file.size)
                    yield Record(number, count, f"{file.name}#{count}", ids)
            self.done_bytes = behind + file.size

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
            *whole, rest = np.split(ids, np.flatnonzero(ids == self._tokenizer.eos_id) + 1)
            for document in [*whole, *(np.split(rest, range(LONGEST, len(rest), LONGEST))[:-1])]:
                yield from self._bare(document)
            rest = rest[(len(rest) - 1) // LONGEST * LONGEST :] if len(rest) else rest
        yield from self._bare(rest)

    def _bare(self, document: np.ndarray) -> Iterator[np.ndarray]:
        """A document without what begins and ends it, in pieces that are not too long; none of an empty one."""
        document = document[~np.isin(document, (self._tokenizer.bos_id, self._tokenizer.eos_id))]
        for start in range(0, len(document), LONGEST):
            yield document[start : start + LONGEST]

    def _open(self, file: SourceFile) -> ArrayFile:
        try:
            bare = not file.name.endswith(".npy")
            tokens = ArrayFile(file.path, self._dtype.newbyteorder("<")) if bare else ArrayFile.npy(file.path)
            if len(tokens) and tokens.dtype.kind not in "iu":
                raise ValueError(f"{tokens.dtype} is no row of whole numbers")
        except Exception as error:  # numpy reads the head of an array as Python, and fails as that does
            raise ValueError(f"data.paths: {file.path} holds no tokens ({error}); check data.token_dtype") from None
        return tokens
