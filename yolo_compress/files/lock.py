"""File locks, so that only one run at a time works in a store.

A lock is a `flock` on an open file. The kernel releases it when the process ends, so there are no stale locks. The file
stays, with a JSON line about the process that holds the lock. On NFS, Linux maps `flock` to a byte-range lock of the
server, which works between machines. Where locks do not work, or only on one machine, a notice says so once.
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

MOUNTS = Path("/proc/self/mountinfo")
LOCAL = {
    "nolock",
    "local_lock=flock",
    "local_lock=all",
    "nobrl",
}  # options of NFS and CIFS: the server knows of no lock
POLL_SECONDS = 0.2  # polling, because Python cannot run its signal handlers during a blocking flock

_held: dict[str, int] = {}
_judged: set[int] = set()  # file systems by device number


def _close_in_child() -> None:
    """Close the lock files in a forked child process. Otherwise the child would hold the locks after its parent was killed.

    The locks of the parent process are not affected.
    """
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def lock(path: Path, what: str, wait: bool = True, shared: bool = False, quietly: bool = False) -> Iterator[None]:
    """Hold the lock file `path` during the block.

    Args:
        path: Lock file. The file and its folder are created if missing.
        what: What this process does, such as "prune of recipe bccd". Waiting processes show it.
        wait: What to do if another process holds the lock. True: print a line to stderr and wait. False: raise `Locked`.
        quietly: Print no line while waiting.
        shared: Let other processes hold the lock at the same time if they share it too.

    Raises:
        Locked: Another process holds the lock, and `wait` is False.
        StorageError: The file cannot be opened, or the file system has no locks.
        RuntimeError: This process already holds the lock, and would wait for itself.
    """
    name = os.path.realpath(path)
    if name in _held:
        raise RuntimeError(f"this process already holds {path}")
    with storage_errors(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held[name] = descriptor
    try:
        _acquire(descriptor, path, wait, shared, quietly)
        if not shared:  # two holders of a shared lock are right
            _judge(descriptor, path)
        with storage_errors(path, "lock"):
            _describe(descriptor, what)
        yield
    finally:
        if _held.pop(name, None) is not None:
            os.close(descriptor)


def _acquire(descriptor: int, path: Path, wait: bool, shared: bool, quietly: bool) -> None:
    announced = quietly
    while not _try(descriptor, path, shared):
        who = holder(path)
        if not wait:
            raise Locked(f"{path} is held by {who}: run again when that has ended, or without lock=fail to wait for it")
        if not announced:
            notice(f"waiting for {who}")
            announced = True
        time.sleep(POLL_SECONDS)


def _try(descriptor: int, path: Path, shared: bool = False) -> bool:
    with storage_errors(path, "lock"):
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _judge(descriptor: int, path: Path) -> None:
    """Print a notice if the file system gives a lock twice, or only keeps it on this machine."""
    device = os.fstat(descriptor).st_dev
    if device in _judged:
        return
    _judged.add(device)
    with storage_errors(path, "lock"):
        other = os.open(path, os.O_RDWR)
    try:
        twice = _try(other, path)
    finally:
        os.close(other)
    if twice:
        notice(f"{path.parent}: locks do not work on this file system; run one command at a time here")
    elif local := LOCAL & _mount_options(device):
        notice(
            f"{path.parent}: locks of this file system work on one machine only ({', '.join(sorted(local))}); run commands of one "
            "machine at a time here"
        )


def _mount_options(device: int) -> set[str]:
    """Return the mount options of a file system; empty if the kernel does not list it."""
    try:
        mounts = [line.split() for line in MOUNTS.read_text(errors="replace").splitlines()]
    except OSError:
        return set()
    number = f"{os.major(device)}:{os.minor(device)}"
    return {option for fields in mounts if number in fields[2:3] for option in f"{fields[5]},{fields[-1]}".split(",")}


def _describe(descriptor: int, what: str) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    info = {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "since": now}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(info) + "\n").encode(), 0)


def holder(path: Path) -> str:
    """Return text about the process that holds, or last held, a lock.

    If the process has only just taken the lock, its line in the lock file may be missing.
    """
    try:
        info = json_text.read(path)
        since = datetime.fromisoformat(info["since"])
        clock = since.strftime("%H:%M:%S" if since.date() == datetime.now().date() else "%Y-%m-%d %H:%M:%S")
        return f"pid {info['pid']} on host {info['host']} ({info['what']}, since {clock})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another run (which holds {path})"
