"""Read the shards of a tokenised split, piece by piece.

A split is one or more shards in order, and each document lies within one shard. A shard has three files:

- `.bin`: the tokens, little-endian, without a header. A document is bos, its tokens, eos.
- `.index.npy`: for each document the position of its first token in `.bin` (in tokens), the position of its name in
  `.names` (in bytes), and the length of its text in bytes (dtype INDEX).
- `.names`: the documents' names, concatenated.

If documents begin with a prompt, a fourth file, `.given.npy`, has the length of each prompt in tokens. The manifest of
the dataset lists the shards, with the lengths and checksums of their files.
"""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.shards.array_file import ArrayFile

INDEX = np.dtype([("token", "<i8"), ("name", "<i8"), ("bytes", "<i8")])
GIVEN = np.dtype("<i8")
COUNTS = ("documents", "tokens", "bytes")


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a shard's tokens: little-endian uint16 if all ids below `vocab_size` fit, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Tokens:
    """The tokens of a split. Has `len`; slices are (n,) arrays of the shards' dtype.

    Args:
        shards: The opened shards in order.
        dtype: The dtype of the shards' tokens, see `token_dtype`.
        parts: For a mixture, (position of the first token, number of tokens, weight) of each corpus; else empty.
        limit: Maximum number of tokens to read, from the beginning; the `len` is not larger.

    Attributes:
        complete: Whether the split is complete; false only while it is being prepared.
    """

    complete = True

    def __init__(
        self,
        shards: Sequence["Shard"],
        dtype: np.dtype,
        parts: Sequence[tuple[int, int, float]] = (),
        limit: int = sys.maxsize,
    ) -> None:
        self.dtype, self.parts, self.limit = dtype, list(parts), limit
        self._join(shards)

    @classmethod
    def mixed(cls, corpora: Sequence[tuple["Tokens", float]]) -> "Tokens":
        """Concatenate the tokens of several corpora, given with their weights. All must have the same dtype."""
        ends = np.cumsum([len(tokens) for tokens, _ in corpora]).tolist()
        parts = [(end - len(t), len(t), weight) for end, (t, weight) in zip(ends, corpora, strict=True)]
        return cls([shard for tokens, _ in corpora for shard in tokens.shards], corpora[0][0].dtype, parts)

    def _join(self, shards: Sequence["Shard"]) -> None:
        self.shards = shards
        self._first_token = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
        self._first_document = np.cumsum([0, *(len(shard.index) for shard in shards)])

    def can_read(self, stop: int) -> bool:
        """Whether the first `stop` tokens can be read now. Always True, except for `StreamedTokens`."""
        return True

    def __len__(self) -> int:
        return min(self.limit, self._total)

    @property
    def _total(self) -> int:
        """The number of tokens of all shards, without the limit."""
        return int(self._first_token[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        parts = [self.shards[number].tokens[first:last] for number, first, last in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first token in it, token after the last) for each shard with some of the tokens [start, stop)."""
        number, pieces = int(np.searchsorted(self._first_token, start, side="right")) - 1, []
        while start < stop:
            base, end = int(self._first_token[number]), min(stop, int(self._first_token[number + 1]))
            if start < end:
                pieces.append((number, start - base, end - base))
            start, number = max(start, end), number + 1
        return pieces

    @cached_property
    def given(self) -> np.ndarray | None:
        """The number of prompt tokens of each document, bos not counted: int64 (documents,). None without prompts."""
        parts = [shard.given for shard in self.shards if shard.given is not None]
        return np.concatenate(parts) if parts else None

    def document(self, number: int) -> np.ndarray:
        """The tokens of document `number` (from 0), (n,), from bos to eos."""
        return self[slice(*self.document_bounds(number))]

    def document_bounds(self, number: int) -> tuple[int, int]:
        """The positions in the split of the first token of document `number`, and of the token after its last token."""
        shard = int(np.searchsorted(self._first_document, number, side="right")) - 1
        first, last = self.shards[shard].bounds(number - int(self._first_document[shard]))
        base = int(self._first_token[shard])
        return base + first, base + last

    @property
    def document_lengths(self) -> np.ndarray:
        """The number of tokens of each document, int64 (documents,)."""
        return np.concatenate([np.diff(s.index[:]["token"], append=len(s.tokens)) for s in self.shards])

    @property
    def document_count(self) -> int:
        return int(self._first_document[-1])

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return sum(int(shard.index[:]["bytes"].sum()) for shard in self.shards)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which documents begin, int64 (n,), in order."""
        starts = [np.empty(0, np.int64)]
        for number, first, last in self._pieces(start, min(stop, len(self))):
            begins = self.shards[number].begins(first, last)
            starts.append(begins[np.searchsorted(begins, first) :] + self._first_token[number])
        return np.concatenate(starts)

    def documents(self, start: int, stop: int) -> list[str]:
        """Names of the documents that tokens [start, stop) belong to, in order."""
        return [
            name
            for number, first, last in self._pieces(start, stop)
            for name in self.shards[number].documents(first, last)
        ]


class Shard:
    """One shard, opened to be read.

    Args:
        folder: The folder of the dataset.
        name: The name of the shard's files without endings, such as train-00000.
        dtype: The dtype of the tokens.
        done: For an unfinished shard, the result of `ShardWriter.state`; later tokens are not read. None for a complete
            shard.

    Raises:
        ValueError: The files are not a shard, or are shorter than `done`.
        OSError: A file is missing or cannot be read.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, done: dict[str, int] | None = None) -> None:
        tokens, names = folder / f"{name}.bin", folder / f"{name}.names"
        self.tokens = ArrayFile(tokens, dtype, count=done["tokens"] if done else None)
        self._names = ArrayFile(names, np.dtype(np.uint8), count=done["names"] if done else None)
        self.index: ArrayFile | np.ndarray
        if done is None:
            self.index = ArrayFile.npy(folder / f"{name}.index.npy")
        else:  # read now, because the file is deleted when the shard is complete
            self.index = np.fromfile(folder / f"{name}.index", INDEX, done["documents"])
            for path, count, size in ((tokens, done["tokens"], dtype.itemsize), (names, done["names"], 1)):
                if path.stat().st_size < count * size or len(self.index) < done["documents"]:
                    raise ValueError(f"{path} is shorter than it was")
        given = folder / f"{name}.given.npy"
        self.given = np.load(given) if given.exists() else None
        if self.index.dtype != INDEX or len(self.index) == 0:
            raise ValueError(f"{name}.index.npy is not an index of documents")
        if self.given is not None and (self.given.dtype != GIVEN or self.given.shape != (len(self.index),)):
            raise ValueError(f"{name}.given.npy does not match the documents of the index")

    def bounds(self, document: int) -> tuple[int, int]:
        """The positions in the shard of a document's first token, and of the token after its last token."""
        first, *after = self.index[document : document + 2]["token"].tolist()
        return first, after[0] if after else len(self.tokens)

    def entries(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """The number of the first document of tokens [start, stop), and the index entries of all their documents."""
        first = bisect_right(range(len(self.index)), start, key=self._begin) - 1
        found = self.index[first : first + stop - start]  # each document has at least one token
        return first, found[: np.searchsorted(found["token"], stop)]

    def begins(self, start: int, stop: int) -> np.ndarray:
        """The positions at which the documents of the tokens [start, stop) begin, int64 (n,).

        The first document may begin before `start`.
        """
        return self.entries(start, stop)[1]["token"]

    def _begin(self, document: int) -> int:
        return int(self.index[document : document + 1]["token"][0])

    def documents(self, start: int, stop: int) -> list[str]:
        """Names of the documents that tokens [start, stop) belong to, in order."""
        first, found = self.entries(start, stop)
        after = self.index[first + len(found) : first + len(found) + 1]["name"].tolist() or [len(self._names)]
        places = [*found["name"].tolist(), *after]
        names = self._names[places[0] : places[-1]].tobytes()
        return [names[b - places[0] : e - places[0]].decode() for b, e in pairwise(places)]
