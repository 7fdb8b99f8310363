"""Tensors in a CPU's memory: what is freed is kept for the next step instead of being given back to the kernel."""

import os

# glibc's malloc takes large pieces from the kernel and gives them back, a few hundred thousand pages in a step, each of
# which the kernel clears anew. Nothing by mmap, nothing given back, and huge pages where the kernel hands them out.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory() -> None:
    """Set glibc's variables for processes that are started from here on, unless one of them is set; others ignore them.

    A process then stays as large as it ever was. What it gains: docs/performance.md.
    """
    if not KEEP.keys() & os.environ.keys():
        os.environ.update(KEEP)
