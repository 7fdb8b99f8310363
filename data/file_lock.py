"""A lock between processes that also works on file systems without locks."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

logger = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


class LockHeld(Exception):
    """Another process holds the lock; the message names the lock file."""


@contextmanager
def file_lock(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`, whose name ends in `.lock` and whose folder exists.

    The kernel releases the lock when the process ends, even if it is killed. On a file system without locks, such as
    NFS without its lock service, a second file `*.owner.lock` replaces the lock: the lock is held while this file
    exists. It contains the id and the host of the process that holds the lock. If that process has ended, the next
    process on the same host takes the lock; on another host, delete the file by hand.

    Args:
        on_wait: Called with a message before this function waits for another process; None: do not wait.

    Raises:
        LockHeld: Another process holds the lock, and `on_wait` is None.
        OSError: The lock file cannot be written.
    """
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            lock = SoftFileLock(path.with_suffix(".owner.lock"))
            logger.warning(
                "%s: this file system has no locks (%s); the file %s takes the place of one",
                *(path.parent, error, lock.lock_file),
            )
            lock.acquire(timeout=0)
    except Timeout:
        by_file = f"; if no other process is running, delete {lock.lock_file}" if isinstance(lock, SoftFileLock) else ""
        if on_wait is None:
            raise LockHeld(f"{lock.lock_file} is held by another process{by_file}") from None
        on_wait(f"waiting for the process that holds {lock.lock_file}{by_file}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
