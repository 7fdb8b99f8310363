"""One-dimensional arrays in files, read piece by piece.

Files are read, not memory-mapped: if a mapped file is truncated or its disk fails, the next access kills the process
with a signal. Here, both cases raise an exception that names the file.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np

MAX_OPEN = 128  # maximum number of open files, over all arrays


class ArrayFile:
    """The numbers in a file, as a one-dimensional array that reads only the requested parts of the file.

    It has a `len`; a slice is a numpy array (n,) of `dtype`. Threads and forked processes may share an ArrayFile.

    Args:
        path: The file.
        dtype: The type of the numbers.
        offset: The byte at which the first number begins.
        count: How many numbers to use; None for all numbers up to the end of the file.

    Raises:
        ValueError: `count` is None, and the file does not end at the end of a number. Or a slice is read, and the file
            has become shorter.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path, dtype: np.dtype, offset: int = 0, count: int | None = None) -> None:
        self.path, self.dtype, self._offset = path, dtype, offset
        if count is None:
            size = path.stat().st_size - offset
            if size % dtype.itemsize:
                raise ValueError(
                    f"{path.name}: its size of {size} bytes is not a multiple of {dtype.itemsize}, the size of a number"
                )
            count = size // dtype.itemsize
        self._count = count

    @classmethod
    def npy(cls, path: Path) -> "ArrayFile":
        """The array in a file written by `numpy.save`.

        Raises:
            ValueError: The array does not have exactly one dimension.
            Exception: From `numpy.load`, for a file that it cannot read.
        """
        head = np.load(path, mmap_mode="r", allow_pickle=False)  # only its header is read
        if head.ndim != 1:
            raise ValueError(f"an array of {head.dtype} with shape {head.shape} is not one-dimensional")
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
                    f"{self.path} is shorter than it was; restore it from a backup or prepare it again, then restart"
                )
            rest, place = rest[got:], place + got
        return out


class _Descriptor:
    """An open file, closed with the last reference. So a reading thread can finish after the cache has dropped it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(MAX_OPEN)
def _opened(file: ArrayFile) -> _Descriptor:
    return _Descriptor(file.path)
