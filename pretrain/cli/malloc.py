"""Settings with which glibc keeps freed memory for the next step instead of returning it to the kernel (CPU runs)."""

import os

# By default glibc takes large allocations from the kernel and returns them: hundreds of thousands of pages in each
# step, which the kernel clears every time. These settings use no mmap, return nothing, and allow huge pages.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory() -> None:
    """Set glibc's variables for processes that start from now on, unless one of them is set.

    A process then never gets smaller than its peak. C libraries other than glibc ignore the variables. The gain is in
    docs/performance.md.
    """
    if not KEEP.keys() & os.environ.keys():
        os.environ.update(KEEP)
