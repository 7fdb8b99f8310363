"""The files that hold a tokenised split, and reading of them, piece by piece.

A split is one shard or several, one behind the other; a document lies in one of them. A shard is three files:
`.bin`, the tokens, little-endian and nothing else; `.index.npy`, for every document its first token, the place
of its name and its length in bytes; `.names`, the documents' names, one behind the other. Where documents begin
with a prompt there is a fourth, `.given.npy`, of the prompts' lengths in tokens. Every document is bos + its
tokens + eos. What belongs together, and the lengths and checksums of the files, is in the manifest of the
preparation.
"""

import hashlib
import os
import shutil
import struct
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.array_file import ArrayFile

INDEX = np.dtype([("token", "<i8"), ("name", "<i8"), ("bytes", "<i8")])
GIVEN = np.dtype("<i8")
COUNTS = ("documents", "tokens", "bytes")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes one shard: a context manager, behind which `entry` gives what the manifest says of it.

    `done`, the `state` of an earlier writer, goes on from there: what was written after it is dropped.
    Raises ValueError when files are shorter than they were.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, done: dict[str, int] | None = None) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._done = done
        self._counts = done or {"documents": 0, "tokens": 0, "bytes": 0, "names": 0, "given": 0}

    def __enter__(self) -> "ShardWriter":
        c, self._counts = self._counts, dict(self._counts)
        with ExitStack() as files:

            def opened(ending: str, length: int) -> BinaryIO:
                path = self._folder / f"{self._name}.{ending}"
                if self._done is None:
                    return files.enter_context(open(path, "wb"))
                if not path.exists() or path.stat().st_size < length:
                    raise ValueError(f"{path}: is shorter than it was")
                os.truncate(path, length)
                return files.enter_context(open(path, "ab"))

            self._bin = opened("bin", c["tokens"] * self._dtype.itemsize)
            self._names = opened("names", c["names"])
            # These become arrays when the shard is whole.
            self._index = opened("index", c["documents"] * INDEX.itemsize)
            self._given = opened("given", c["given"] * GIVEN.itemsize)
            self._files = files.pop_all()
        return self

    @property
    def tokens(self) -> int:
        return self._counts["tokens"]

    def add(self, name: str, tokens: np.ndarray, text_bytes: int, given: int | None = None) -> None:
        """Append a document, its `tokens` (n,) already between bos and eos, `given` of them after bos a prompt."""
        counts, encoded = self._counts, name.encode()
        self._index.write(struct.pack("<qqq", counts["tokens"], counts["names"], text_bytes))  # as INDEX says
        self._bin.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._names.write(encoded)
        if given is not None:
            self._given.write(struct.pack("<q", given))
            counts["given"] += 1
        counts["documents"] += 1
        counts["tokens"] += len(tokens)
        counts["bytes"] += text_bytes
        counts["names"] += len(encoded)

    def state(self) -> dict[str, int]:
        """How far the shard is; all of that is on the disk now."""
        for file in (self._bin, self._names, self._index, self._given):
            file.flush()
            os.fsync(file.fileno())
        return dict(self._counts)

    def __exit__(self, *error: object) -> None:
        self._files.close()
        if error[0] is None:
            for ending, dtype in (("index", INDEX), ("given", GIVEN)):
                raw = self._folder / f"{self._name}.{ending}"
                if ending == "index" or raw.stat().st_size:
                    _save_as_array(raw, dtype)

    def entry(self) -> dict[str, Any]:
        """Counts, and length and checksum of every file."""
        endings = ["bin", "index.npy", "names", *(["given.npy"] if self._counts["given"] else [])]
        files = [self._folder / f"{self._name}.{ending}" for ending in endings]
        return {
            "name": self._name,
            **{key: self._counts[key] for key in COUNTS},
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        }


def _save_as_array(raw: Path, dtype: np.dtype) -> None:
    """What ``np.save`` would write of a file of nothing but entries, without holding them."""
    entries = raw.stat().st_size // dtype.itemsize
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (entries,)}
    with open(raw, "rb") as read, open(f"{raw}.npy", "wb") as written:
        np.lib.format.write_array_header_1_0(written, header)
        shutil.copyfileobj(read, written)


class SplitWriter:
    """Writes a split as shards, a new one where the last has `shard_tokens` or more; goes on from a `state`."""

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = list(state["shards"]) if state else []
        """What the manifest says of the shards that are whole."""
        self._open(state["open"] if state else None)

    def _open(self, done: dict[str, int] | None) -> None:
        name = f"{self._split}-{len(self.entries):05d}"
        self._shard = ShardWriter(self._folder, name, self._dtype, done).__enter__()

    def add(self, name: str, tokens: np.ndarray, text_bytes: int, given: int | None = None) -> None:
        if self._shard.tokens >= self._shard_tokens:
            self.close()
            self._open(None)
        self._shard.add(name, tokens, text_bytes, given)

    def state(self) -> dict[str, Any]:
        return {"shards": self.entries, "open": self._shard.state()}

    def close(self) -> None:
        """Make the last shard whole."""
        self._shard.state()
        self._shard.__exit__(None, None, None)
        self.entries.append(self._shard.entry())

    def abandon(self) -> None:
        self._shard.__exit__(ValueError)


class Tokens:
    """The tokens of a split: `len`, slices as arrays (n,) of the shards' dtype, and the documents' names.

    `names` are those of its shards, in order.
    """

    def __init__(self, folder: Path, names: str | Sequence[str], dtype: np.dtype) -> None:
        names = [names] if isinstance(names, str) else names
        self._join([Shard(folder, name, dtype) for name in names], dtype)
        self.parts: list[tuple[int, int, float]] = []
        """Of a mixture: for every corpus its first token, how many it has, and its weight."""

    @classmethod
    def of(cls, shards: Sequence["Shard"], dtype: np.dtype) -> "Tokens":
        """The tokens of shards that are open already."""
        joined = cls.__new__(cls)
        joined._join(list(shards), dtype)
        joined.parts = []
        return joined

    @classmethod
    def mixed(cls, corpora: Sequence[tuple["Tokens", float]]) -> "Tokens":
        """Corpora of the same dtype with their weights, one behind the other."""
        joined = cls.of([shard for tokens, _ in corpora for shard in tokens._shards], corpora[0][0]._dtype)
        ends = np.cumsum([len(tokens) for tokens, _ in corpora]).tolist()
        joined.parts = [(end - len(t), len(t), weight) for end, (t, weight) in zip(ends, corpora, strict=True)]
        return joined

    def _join(self, shards: list["Shard"], dtype: np.dtype) -> None:
        self._shards, self._dtype = shards, dtype
        self._first_token = np.cumsum([0, *(len(shard.tokens) for shard in self._shards)])
        self._first_document = np.cumsum([0, *(len(shard.index) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._first_token[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        parts = [self._shards[number].tokens[first:last] for number, first, last in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self._dtype)])

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The numbers of the shards that tokens [start, stop) lie in, each with the places there."""
        number, pieces = int(np.searchsorted(self._first_token, start, side="right")) - 1, []
        while start < stop:
            base, end = int(self._first_token[number]), min(stop, int(self._first_token[number + 1]))
            if start < end:
                pieces.append((number, start - base, end - base))
            start, number = max(start, end), number + 1
        return pieces

    @cached_property
    def given(self) -> np.ndarray | None:
        """(documents,) int64: how many tokens after bos are a prompt; None where there are no prompts."""
        parts = [shard.given for shard in self._shards if shard.given is not None]
        return np.concatenate(parts) if parts else None

    def document(self, number: int) -> np.ndarray:
        """The tokens (n,) of a document, from bos to eos."""
        return self[slice(*self.document_bounds(number))]

    def document_bounds(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_document, number, side="right")) - 1
        first, last = self._shards[shard].bounds(number - int(self._first_document[shard]))
        base = int(self._first_token[shard])
        return base + first, base + last

    @property
    def document_lengths(self) -> np.ndarray:
        """How many tokens each document has, (documents,) int64."""
        return np.concatenate([np.diff(s.index[:]["token"], append=len(s.tokens)) for s in self._shards])

    @property
    def document_count(self) -> int:
        return int(self._first_document[-1])

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text the tokens stand for."""
        return sum(int(shard.index[:]["bytes"].sum()) for shard in self._shards)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """The tokens in [start, stop) with which a document begins, int64 in order."""
        starts = [np.empty(0, np.int64)]
        for number, first, last in self._pieces(start, min(stop, len(self))):
            begins = self._shards[number].begins(first, last)
            starts.append(begins[np.searchsorted(begins, first) :] + self._first_token[number])
        return np.concatenate(starts)

    def documents(self, start: int, stop: int) -> list[str]:
        """Names of the documents that tokens [start, stop) belong to, in order."""
        return [
            name
            for number, first, last in self._pieces(start, stop)
            for name in self._shards[number].documents(first, last)
        ]


class Shard:
    """One shard to be read. `done`, the `state` of a writer that is still at it, is how much of it can be.

    Raises ValueError for files that are no shard, or shorter than `done` says.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, done: dict[str, int] | None = None) -> None:
        tokens, names = folder / f"{name}.bin", folder / f"{name}.names"
        self.tokens = ArrayFile(tokens, dtype, count=done["tokens"] if done else None)
        self._names = ArrayFile(names, np.dtype(np.uint8), count=done["names"] if done else None)
        self.index: ArrayFile | np.ndarray
        if done is None:
            self.index = ArrayFile.npy(folder / f"{name}.index.npy")
        else:  # read at once: the file goes when the shard is whole
            self.index = np.fromfile(folder / f"{name}.index", INDEX, done["documents"])
            for path, count, size in ((tokens, done["tokens"], dtype.itemsize), (names, done["names"], 1)):
                if path.stat().st_size < count * size or len(self.index) < done["documents"]:
                    raise ValueError(f"{path}: is shorter than it was")
        given = folder / f"{name}.given.npy"
        self.given = np.load(given) if given.exists() else None
        if self.index.dtype != INDEX or len(self.index) == 0:
            raise ValueError(f"{name}.index.npy is no index of documents")
        if self.given is not None and (self.given.dtype != GIVEN or self.given.shape != (len(self.index),)):
            raise ValueError(f"{name}.given.npy is not of the index's documents")

    def bounds(self, document: int) -> tuple[int, int]:
        first, *behind = self.index[document : document + 2]["token"].tolist()
        return first, behind[0] if behind else len(self.tokens)

    def entries(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """The first document that tokens [start, stop) belong to, and the index's entries of it and the others."""
        first = bisect_right(range(len(self.index)), start, key=self._begin) - 1
        found = self.index[first : first + stop - start]  # no document is without a token
        return first, found[: np.searchsorted(found["token"], stop)]

    def begins(self, start: int, stop: int) -> np.ndarray:
        """The tokens that those documents begin with, the first of them perhaps before `start`."""
        return self.entries(start, stop)[1]["token"]

    def _begin(self, document: int) -> int:
        return int(self.index[document : document + 1]["token"][0])

    def documents(self, start: int, stop: int) -> list[str]:
        first, found = self.entries(start, stop)
        behind = self.index[first + len(found) : first + len(found) + 1]["name"].tolist() or [len(self._names)]
        places = [*found["name"].tolist(), *behind]
        names = self._names[places[0] : places[-1]].tobytes()
        return [names[b - places[0] : e - places[0]].decode() for b, e in pairwise(places)]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
