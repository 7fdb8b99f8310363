"""The files that hold a tokenised split, and memory-mapped reading of them.

A shard is three files: `.bin`, the tokens, little-endian and nothing else; `.index.npy`, for every document
its first token, the place of its name and its length in bytes; `.names`, the documents' names, one behind
the other. Where documents begin with a prompt there is a fourth, `.given.npy`, of the prompts' lengths in
tokens. Every document is bos + its tokens + eos. What belongs together, and the lengths and checksums
of the files, is in the manifest of the preparation.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

INDEX = np.dtype([("token", "<i8"), ("name", "<i8"), ("bytes", "<i8")])


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes one shard: a context manager, behind which `entry` gives what the manifest says of it."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._index: list[tuple[int, int, int]] = []
        self._given: list[int] = []
        self._tokens = 0

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as files:
            self._bin = files.enter_context(open(self._folder / f"{self._name}.bin", "wb"))
            self._names = files.enter_context(open(self._folder / f"{self._name}.names", "wb"))
            self._files = files.pop_all()
        return self

    def add(self, name: str, tokens: np.ndarray, text_bytes: int, given: int | None = None) -> None:
        """Append a document, its `tokens` (n,) already between bos and eos, `given` of them after bos a prompt."""
        if given is not None:
            self._given.append(given)
        self._index.append((self._tokens, self._names.tell(), text_bytes))
        self._bin.write(tokens.astype(self._dtype).tobytes())
        self._names.write(name.encode())
        self._tokens += len(tokens)

    def __exit__(self, *error: object) -> None:
        self._files.close()
        np.save(self._folder / f"{self._name}.index.npy", np.array(self._index, dtype=INDEX))
        if self._given:
            np.save(self._folder / f"{self._name}.given.npy", np.array(self._given, dtype="<i8"))

    def entry(self) -> dict[str, Any]:
        """Counts, and length and checksum of every file."""
        endings = ["bin", "index.npy", "names", *(["given.npy"] if self._given else [])]
        files = [self._folder / f"{self._name}.{ending}" for ending in endings]
        return {
            "name": self._name,
            "documents": len(self._index),
            "tokens": self._tokens,
            "bytes": sum(text_bytes for _, _, text_bytes in self._index),
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        }


class Tokens:
    """The tokens of a split: `len`, slices as arrays (n,) of the shard's dtype, and the documents' names.

    `given` (documents,) int64 is how many tokens after bos are a prompt, None where there are no prompts.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self._tokens = np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
        self._index = np.load(folder / f"{name}.index.npy", mmap_mode="r")
        self._names = np.memmap(folder / f"{name}.names", dtype=np.uint8, mode="r")
        given = folder / f"{name}.given.npy"
        self.given = np.load(given) if given.exists() else None

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, where: slice) -> np.ndarray:
        return np.asarray(self._tokens[where])

    def document(self, number: int) -> np.ndarray:
        """The tokens (n,) of a document, from bos to eos."""
        return self[slice(*self.document_bounds(number))]

    def document_bounds(self, number: int) -> tuple[int, int]:
        last = number + 1 == len(self._index)
        return int(self._index["token"][number]), len(self) if last else int(self._index["token"][number + 1])

    @property
    def document_lengths(self) -> np.ndarray:
        """How many tokens each document has, (documents,) int64."""
        return np.diff(self._index["token"], append=len(self))

    @property
    def document_count(self) -> int:
        return len(self._index)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text the tokens stand for."""
        return int(self._index["bytes"].sum())

    def documents(self, start: int, stop: int) -> list[str]:
        """Names of the documents that tokens [start, stop) belong to, in order."""
        first = int(np.searchsorted(self._index["token"], start, side="right")) - 1
        last = int(np.searchsorted(self._index["token"], stop, side="left"))
        ends = [*self._index["name"][first + 1 : last + 1].tolist(), len(self._names)]
        begins = self._index["name"][first:last].tolist()
        return [bytes(self._names[b:e]).decode() for b, e in zip(begins, ends, strict=False)]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
