"""What the null GPU has counted in this process.

before = counts(); step(); print(since(before))
with kernels() as launched: step()                  # launches by the name of the kernel
"""

import ctypes
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In the order of Count in gpu.h. Launches hold the matrix products too; waits are those of the host for the device;
# pageable copies are those from or to memory that is not pinned, which are counted by their direction as well.
NAMES = (
    "launches", "products", "waits", "copies_in", "copies_out", "copies_within", "pageable_copies", "fills",
    "allocations", "releases", "bytes_in", "bytes_out", "bytes_pinned",
)  # fmt: skip

_gpu = ctypes.CDLL(None)
if not hasattr(_gpu, "null_gpu_count"):
    sys.exit("This is not the null GPU: run it by tests/null_gpu/run.sh python ...")
_gpu.null_gpu_count.restype = ctypes.c_long


def counts() -> Counter[str]:
    """Since the process began."""
    return Counter({name: _gpu.null_gpu_count(i) for i, name in enumerate(NAMES)})


def since(before: Counter[str]) -> Counter[str]:
    return counts() - before  # without what is zero


def contexts() -> list[int]:
    """The devices on which this process has made a context."""
    return [device for device in range(16) if _gpu.null_gpu_contexts() >> device & 1]


@contextmanager
def kernels() -> Iterator[Counter[str]]:
    """Fills the counter, at the end, with how often each kernel was launched."""
    launched: Counter[str] = Counter()
    _gpu.null_gpu_by_name(1)
    yield launched
    _gpu.null_gpu_by_name(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "names")
        if _gpu.null_gpu_write_names(bytes(file)):
            raise OSError(f"{file} could not be written")
        for line in file.read_text().splitlines():
            times, name = line.split("\t", 1)
            launched[name] += int(times)
