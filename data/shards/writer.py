"""Write the shards of a split, and resume from the state of an earlier writer."""

import os
import shutil
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.atomic import fsync, sha256
from data.shards.reader import COUNTS, GIVEN, INDEX


class ShardWriter:
    """Writes one shard. A context manager; after its end, `entry` returns the shard's entry in the manifest.

    Args:
        name: The name of the shard's files without endings, such as train-00000.
        done: The result of `state` of an earlier writer: writing resumes there, and later content is removed. None
            begins a new shard.

    Raises:
        ValueError: On entering, a file is shorter than `done`.
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
                    raise ValueError(f"{path} is shorter than it was")
                os.truncate(path, length)
                return files.enter_context(open(path, "ab"))

            self._bin = opened("bin", c["tokens"] * self._dtype.itemsize)
            self._names = opened("names", c["names"])
            # These two become .npy files only when the shard is complete, because a .npy file begins with its length.
            self._index = opened("index", c["documents"] * INDEX.itemsize)
            self._given = opened("given", c["given"] * GIVEN.itemsize)
            self._files = files.pop_all()
        return self

    @property
    def tokens(self) -> int:
        return self._counts["tokens"]

    def add(self, name: str, tokens: np.ndarray, text_bytes: int, given: int | None = None) -> None:
        """Append a document.

        Args:
            tokens: The tokens from bos to eos, (n,).
            text_bytes: The number of UTF-8 bytes of the document's text.
            given: The number of tokens after bos that are a prompt; None for a split without prompts.
        """
        counts, encoded = self._counts, name.encode()
        self._index.write(struct.pack("<qqq", counts["tokens"], counts["names"], text_bytes))  # INDEX
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
        """Flush everything to disk, and return the counts so far.

        Keys: `documents`, `tokens`, `bytes` (of texts), `names` (bytes of names), `given` (documents with a prompt).
        """
        for file in (self._bin, self._names, self._index, self._given):
            file.flush()
            fsync(file.fileno())
        return dict(self._counts)

    def __exit__(self, *error: object) -> None:
        self._files.close()
        if error[0] is None:
            for ending, dtype in (("index", INDEX), ("given", GIVEN)):
                raw = self._folder / f"{self._name}.{ending}"
                if ending == "index" or raw.stat().st_size:
                    _save_as_array(raw, dtype)

    def entry(self) -> dict[str, Any]:
        """The shard's entry in the manifest: its counts, and the length and checksum of each file."""
        endings = ["bin", "index.npy", "names", *(["given.npy"] if self._counts["given"] else [])]
        files = [self._folder / f"{self._name}.{ending}" for ending in endings]
        return {
            "name": self._name,
            **{key: self._counts[key] for key in COUNTS},
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        }


def _save_as_array(raw: Path, dtype: np.dtype) -> None:
    """Write the entries of the file `raw` to `<raw>.npy` in the format of np.save, without reading them into memory."""
    entries = raw.stat().st_size // dtype.itemsize
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (entries,)}
    with open(raw, "rb") as read, open(f"{raw}.npy", "wb") as written:
        np.lib.format.write_array_header_1_0(written, header)
        shutil.copyfileobj(read, written)
        written.flush()
        fsync(written.fileno())


class SplitWriter:
    """Writes a split as shards. A shard ends with the document that reaches `shard_tokens` tokens.

    With `state`, the result of the method `state` of an earlier writer, writing resumes there. `entries` are the
    manifest's entries of the complete shards.
    """

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None = None
    ) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self.entries: list[dict[str, Any]] = list(state["shards"]) if state else []
        self._open(state["open"] if state else None)

    def _open(self, done: dict[str, int] | None) -> None:
        name = f"{self._split}-{len(self.entries):05d}"
        self._shard = ShardWriter(self._folder, name, self._dtype, done).__enter__()

    def add(self, name: str, tokens: np.ndarray, text_bytes: int, given: int | None = None) -> None:
        """Append a document, as `ShardWriter.add` does."""
        if self._shard.tokens >= self._shard_tokens:
            self.close()
            self._open(None)
        self._shard.add(name, tokens, text_bytes, given)

    def state(self) -> dict[str, Any]:
        """Flush everything to disk. Returns "shards": `entries`, and "open": the state of the open `ShardWriter`."""
        return {"shards": self.entries, "open": self._shard.state()}

    def close(self) -> None:
        """Complete the open shard: flush it, write its index, and add its entry to `entries`.

        Raises:
            OSError: The disk is full or fails.
        """
        self._shard.state()
        self._shard.__exit__(None, None, None)
        self.entries.append(self._shard.entry())

    def abandon(self) -> None:
        """Close the files. The last shard stays incomplete and can be resumed."""
        self._shard.__exit__(ValueError)
