"""Atomic writes: after a kill or power cut at any moment, there is either the whole old file or the whole new file.

The steps are: write a temporary file in the same folder, fsync it, `os.replace`, fsync the folder. Failures of the file
system become `StorageError`. For tests, `YOLO_COMPRESS_CRASH_AT=n` kills the process at the n-th step.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from yolo_compress import home
from yolo_compress.errors import StorageError

CRASH_AT = int(os.environ.get("YOLO_COMPRESS_CRASH_AT") or 0)
CRASH_STATUS = 137  # exit status that a shell reports after SIGKILL
TEMPORARY = ".tmp-"  # a prefix, because some libraries choose the format by the suffix
_FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_MIB = 1.0  # with less free space, a failed write of a library counts as a full disk
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.ENOTSUP)  # some FUSE and SMB mounts cannot do it; an error would not help

_points_passed = 0


def crash_point(label: str) -> None:
    """End the process as SIGKILL does, if this is step number `YOLO_COMPRESS_CRASH_AT` of the process."""
    global _points_passed
    if not CRASH_AT:
        return
    _points_passed += 1
    if _points_passed == CRASH_AT:
        os.write(2, f"crash point {CRASH_AT}: {label}\n".encode())
        os._exit(CRASH_STATUS)


@contextmanager
def storage_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turn errors of the file system inside the block into a `StorageError` (see `storage_error`)."""
    try:
        yield
    except Exception as error:
        if converted := storage_error(error, path, action):
            raise converted from error
        raise


def storage_error(error: BaseException, path: Path, action: str = "write") -> StorageError | None:
    """Return a `StorageError` if the cause of an error is the file system, else None.

    The message has the path, the reason and, on a full disk, the free space. Libraries (torch, ONNX, OpenVINO, numpy) raise other
    errors for a failed write. They become a `StorageError` if the disk of `path` is full now.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(_explain(error, path, action))
    if action != "read" and isinstance(error, OSError | RuntimeError | ValueError | EOFError):
        free = free_mib(path)
        if free < FULL_MIB:
            first = str(error).strip().partition("\n")[0]
            reason = os.strerror(errno.ENOSPC)
            return StorageError(f"cannot {action} {path}: {reason} ({type(error).__name__}: {first}){_free_hint(free)}")
    return None


def _explain(error: OSError, path: Path, action: str) -> str:
    message = f"cannot {action} {path}: {os.strerror(error.errno or 0)}"
    culprit = error.filename if isinstance(error.filename, str | os.PathLike) else None
    if culprit and TEMPORARY not in str(culprit) and str(culprit) != str(path):
        message += f" ({culprit})"
    if error.errno in _REFUSED and action != "read" and home.holds(path):
        message += f"; set {home.VARIABLE} to a folder that can be written, for weights/ and datasets/"
    if error.errno in _FULL:
        message += _free_hint(free_mib(path))
    if error.errno == errno.EFBIG:
        message += "; the file is larger than this system or `ulimit -f` allows: raise the limit and run the same command again"
    return message


def _free_hint(free: float) -> str:
    return f"; {free:.1f} MiB free on its file system: make room and run the same command again"


def free_mib(path: Path) -> float:
    """Return the free space in MiB of the file system of `path`. `path` need not exist. nan: the space is unknown."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free / 2**20
        except FileNotFoundError:
            continue
        except OSError:
            break
    return float("nan")


def require_free(path: Path, needed_mib: float, what: str) -> None:
    """Check the free space before a piece of work.

    Args:
        path: File or folder that will be written.
        needed_mib: Space that the work needs, in MiB.
        what: Name of the work for the error message.

    Raises:
        StorageError: Less than `needed_mib` is free on the file system of `path`.
    """
    free = free_mib(path)
    if free < needed_mib:
        raise StorageError(f"{what} needs {needed_mib:.0f} MiB at {path} and {free:.0f} MiB are free: make room first")


def is_temporary(name: str) -> bool:
    """Return whether `name` is the name of the temporary file of an unfinished atomic write."""
    return name.startswith(TEMPORARY)


def _temporary_for(path: Path) -> Path:
    # 40 characters have at most 160 bytes, so that with the prefix the name is within the limit of 255 bytes.
    return path.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{path.name[-40:]}"


def fsync_file(path: Path) -> None:
    """Write the file's bytes to the disk, and wait for that."""
    crash_point(f"before fsync of {path.name}")
    _fsync(path, os.O_RDONLY)
    crash_point(f"after fsync of {path.name}")


def fsync_directory(path: Path) -> None:
    """Write the folder's entries (names, renames) to the disk, and wait for that."""
    crash_point(f"before fsync of folder {path.name}")
    try:
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    crash_point(f"after fsync of folder {path.name}")


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target`, replacing an existing file, and wait until the rename is on the disk.

    Raises:
        OSError: The file system failed. It is not turned into a `StorageError`.
    """
    crash_point(f"before replace of {target.name}")
    os.replace(source, target)
    crash_point(f"after replace of {target.name}")
    fsync_directory(target.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file atomically. Text is written as UTF-8.

    Raises:
        StorageError: The file system failed. The previous file is unchanged.
    """
    content = memoryview(data.encode() if isinstance(data, str) else data)
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            crash_point(f"before write of {path.name}")
            while content:
                content = content[os.write(descriptor, content) :]
            crash_point(f"after write of {path.name}")
        finally:
            os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. When the block ends, rename it to `path`.

    This is for libraries that write to a path. If the block raises, `path` is unchanged and the temporary file is deleted.

    Raises:
        StorageError: The file system failed, inside the block or after it.
    """
    path = Path(path)
    temporary = _temporary_for(path)
    try:
        with storage_errors(path):
            yield temporary
            fsync_file(temporary)
            replace(temporary, path)
    finally:
        with suppress(OSError):  # the first error matters more; `publish` and `gc` delete leftovers
            temporary.unlink(missing_ok=True)


def atomic_symlink(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, and replace an existing link.

    Raises:
        OSError: The file system failed. It is not turned into a `StorageError`.
    """
    temporary = _temporary_for(path)
    try:
        os.symlink(target, temporary)
        replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
