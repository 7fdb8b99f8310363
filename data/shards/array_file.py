"""Rows of numbers in files, read piece by piece.

They are read, not mapped: of a mapped file that is cut short meanwhile the first touch ends the process by a signal,
and a disk's error does. Here either is an exception with the file's name.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

OPEN = 128  # files that are open at a time, however many there are


class ArrayFile:
    """Numbers of one `dtype` from byte `offset` of a file on, `count` of them or all: `len`, and slices as (n,) arrays.

    Threads and forked processes may share one. Raises ValueError for a file that holds no whole number of them.
    """

    def __init__(self, path: Path, dtype: np.dtype, offset: int = 0, count: int | None = None) -> None:
        self.path, self.dtype, self._offset = path, dtype, offset
        if count is None:
            size = path.stat().st_size - offset
            if size % dtype.itemsize:
                raise ValueError(f"{path.name}: {size} bytes are no whole number of {dtype}")
            count = size // dtype.itemsize
        self._count = count

    @classmethod
    def npy(cls, path: Path) -> "ArrayFile":
        """What `numpy.save` wrote; raises what `numpy.load` does, and ValueError for more than one dimension."""
        head = np.load(path, mmap_mode="r", allow_pickle=False)  # of which nothing but the head is looked at
        if head.ndim != 1:
            raise ValueError(f"{head.dtype} of shape {head.shape} is no row of whole numbers")
        return cls(path, head.dtype, head.offset, len(head))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self._count)
        out = np.empty(max(0, stop - start), self.dtype)
        rest, place = out.view(np.uint8).data, self._offset + start * self.dtype.itemsize
        file = _opened(self)
        while rest:
            try:
                got = os.preadv(file.number, [rest], place)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if not got:
                raise ValueError(
                    f"{self.path}: is shorter than it was; bring it back from a copy, or make it anew, and start again"
                )
            rest, place = rest[got:], place + got
        return out


class _Descriptor:
    """An open file, closed when nobody has it any more: who reads from it in a thread does, whatever others open."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(OPEN)
def _opened(file: ArrayFile) -> _Descriptor:
    return _Descriptor(file.path)
