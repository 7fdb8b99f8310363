"""Settings that make glibc keep freed memory for the next step instead of returning it to the kernel (CPU runs)."""

import os

# By default, glibc requests large blocks from the kernel and returns them in each step: hundreds of thousands of pages,
# which the kernel clears every time. With these settings it uses no mmap, returns nothing, and may use huge pages.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def keep_freed_memory() -> None:
    """Make processes that are started afterwards keep freed memory, by environment variables of glibc.

    If one of the variables is already set, nothing changes. These processes keep their peak memory until they end. C
    libraries other than glibc ignore the variables. For the gain, see docs/performance.md.
    """
    if not KEEP.keys() & os.environ.keys():
        os.environ.update(KEEP)
