"""Locks between processes on any system: each is a small file that is locked, and the lock goes with its process."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def try_lock(path):
    """Lock a file, made if it isn't there, without waiting.

    Args:
        path: of the lock file; what it protects lies elsewhere.

    Returns:
        The lock, held until `unlock` or until its process ends, killed or not; None where another one holds it.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path, thread_local=False)
    try:
        return lock.acquire(timeout=0).lock
    except Timeout:
        return None


def unlock(lock, remove=True):
    """Let a lock go.

    Args:
        lock: of `try_lock`.
        remove: remove its file too, before anybody else can hold it.
    """
    if remove:
        with suppress(OSError):  # Windows removes no open file; there the release does it
            Path(lock.lock_file).unlink()
    lock.release()
