"""One run at a time in a store.

The lock is a `flock` on an open file: the kernel drops it when the holder dies, by whatever signal, so there are no
stale locks to judge by process id and none to delete. The file itself stays and holds a JSON line about the holder, for
people. On NFS, Linux maps `flock` to a byte-range lock of the server, which works between machines unless the mount
says `nolock` or `local_lock=flock`; then it protects against runs on the same machine only.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from yolo_compress.errors import Locked
from yolo_compress.files.atomic import storage_errors
from yolo_compress.progress import notice
from yolo_compress.runtime import json_text

POLL_SECONDS = 0.2  # not a blocking flock: Python runs its signal handlers between two tries

_held: dict[str, int] = {}


def _close_in_child() -> None:
    """A forked data worker must not keep the lock alive after its parent was killed; closing a copy does not unlock."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def lock(path: Path, what: str, wait: bool = True) -> Iterator[None]:
    """Holds `path` for the time of the block.

    Args:
        path: lock file; made if missing, its folder too.
        what: shown to whoever waits, such as "prune of recipe bccd".
        wait: wait for the holder after one line on stderr that says who it is, or raise.

    Raises:
        Locked: somebody holds it and `wait` is false.
        StorageError: the file cannot be opened, or the file system has no locks.
        RuntimeError: this process holds it already and would wait for itself.
    """
    name = os.path.realpath(path)
    if name in _held:
        raise RuntimeError(f"{path} is held by this process already")
    with storage_errors(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held[name] = descriptor
    try:
        _acquire(descriptor, path, wait)
        with storage_errors(path, "lock"):
            _describe(descriptor, what)
        yield
    finally:
        if _held.pop(name, None) is not None:
            os.close(descriptor)


def _acquire(descriptor: int, path: Path, wait: bool) -> None:
    announced = False
    while not _try(descriptor, path):
        who = holder(path)
        if not wait:
            raise Locked(f"{path} is held by {who}: run again when that has ended, or without lock=fail to wait for it")
        if not announced:
            notice(f"waiting for {who}")
            announced = True
        time.sleep(POLL_SECONDS)


def _try(descriptor: int, path: Path) -> bool:
    with storage_errors(path, "lock"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _describe(descriptor: int, what: str) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    info = {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "since": now}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(info) + "\n").encode(), 0)


def holder(path: Path) -> str:
    """Who holds (or last held) a lock, in words; the holder may be between taking the lock and writing its line."""
    try:
        info = json_text.read(path)
        since = datetime.fromisoformat(info["since"])
        clock = since.strftime("%H:%M:%S" if since.date() == datetime.now().date() else "%Y-%m-%d %H:%M:%S")
        return f"pid {info['pid']} on host {info['host']} ({info['what']}, since {clock})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another run (the holder of {path})"
