"""Writes that leave either the whole old file or the whole new one, whatever moment the power or the process dies.

The recipe: a temporary file in the same folder, write, fsync, `os.replace`, fsync of the folder. Failures of the file
system become `StorageError`, and `YOLO_COMPRESS_CRASH_AT=n` kills the process at the n-th step for the tests.
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
CRASH_STATUS = 137  # what a shell reports for a process that SIGKILL ended
TEMPORARY = ".tmp-"  # prefix, so that the extension survives for libraries that choose a format by it
_FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_MIB = 1.0  # free space at which a failed write of a library is taken for one of the disk
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_NO_DIRECTORY_FSYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
)  # some FUSE and SMB mounts; there is nothing to be gained by failing

_points_passed = 0


def crash_point(label: str) -> None:
    """Ends the process as SIGKILL would at the step that `YOLO_COMPRESS_CRASH_AT` names (counted per process)."""
    global _points_passed
    if not CRASH_AT:
        return
    _points_passed += 1
    if _points_passed == CRASH_AT:
        os.write(2, f"crash point {CRASH_AT}: {label}\n".encode())
        os._exit(CRASH_STATUS)


@contextmanager
def storage_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turns what the file system refused into a `StorageError`; see `storage_error`."""
    try:
        yield
    except Exception as error:
        if found := storage_error(error, path, action):
            raise found from error
        raise


def storage_error(error: BaseException, path: Path, action: str = "write") -> StorageError | None:
    """The `StorageError` for an error whose cause is the file system, else None.

    It names the path, the reason and, on a full disk, what is free. Libraries (torch, ONNX, OpenVINO, numpy) report a
    failed write in words of their own: theirs counts as one where the disk that holds `path` is full now.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(_explain(error, path, action))
    if action != "read" and isinstance(error, OSError | RuntimeError | ValueError | EOFError):
        free = free_mib(path)
        if free < FULL_MIB:
            first = str(error).strip().partition("\n")[0]
            reason = os.strerror(errno.ENOSPC)
            return StorageError(f"cannot {action} {path}: {reason} ({type(error).__name__}: {first}){_room(free)}")
    return None


def _explain(error: OSError, path: Path, action: str) -> str:
    message = f"cannot {action} {path}: {os.strerror(error.errno or 0)}"
    culprit = error.filename if isinstance(error.filename, str | os.PathLike) else None
    if culprit and TEMPORARY not in str(culprit) and str(culprit) != str(path):
        message += f" ({culprit})"
    if error.errno in _REFUSED and action != "read" and home.holds(path):
        message += f"; give a folder that can be written as {home.VARIABLE}: weights/ and datasets/ go there"
    if error.errno in _FULL:
        message += _room(free_mib(path))
    if error.errno == errno.EFBIG:
        message += "; the file is larger than this system or `ulimit -f` allows: raise the limit and run the same command again"
    return message


def _room(free: float) -> str:
    return f"; {free:.1f} MiB free on its file system: make room and run the same command again"


def free_mib(path: Path) -> float:
    """Free space in MiB of the file system that holds `path` or would hold it (nan if it will not say)."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free / 2**20
        except FileNotFoundError:
            continue
        except OSError:
            break
    return float("nan")


def require_free(path: Path, needed_mib: float, what: str) -> None:
    """Stops before the work rather than at the end of it.

    Raises:
        StorageError: less than `needed_mib` MiB are free where `path` is or will be.
    """
    free = free_mib(path)
    if free < needed_mib:
        raise StorageError(f"{what} needs {needed_mib:.0f} MiB at {path} and {free:.0f} MiB are free: make room first")


def is_temporary(name: str) -> bool:
    """Whether a file name is that of an unfinished atomic write."""
    return name.startswith(TEMPORARY)


def _temporary_for(path: Path) -> Path:
    # At most 40 characters of the name: four bytes each and the prefix still fit the 255 bytes a name may have.
    return path.parent / f"{TEMPORARY}{secrets.token_hex(4)}-{path.name[-40:]}"


def fsync_file(path: Path) -> None:
    """Returns when the file's bytes are on the disk."""
    crash_point(f"before fsync of {path.name}")
    _fsync(path, os.O_RDONLY)
    crash_point(f"after fsync of {path.name}")


def fsync_directory(path: Path) -> None:
    """Returns when the folder's entries (names, renames) are on the disk."""
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
    """Renames over `target` and makes the rename durable. Raises the plain `OSError`."""
    crash_point(f"before replace of {target.name}")
    os.replace(source, target)
    crash_point(f"after replace of {target.name}")
    fsync_directory(target.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a whole file; text is UTF-8.

    Raises:
        StorageError: the file system refused; the previous file is as it was.
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
    """For libraries that write by path: yields a path beside `path`, to take its place when the block ends well.

    If the block raises, `path` is as it was and the temporary file is gone.

    Raises:
        StorageError: the file system refused, inside the block too.
    """
    path = Path(path)
    temporary = _temporary_for(path)
    try:
        with storage_errors(path):
            yield temporary
            fsync_file(temporary)
            replace(temporary, path)
    finally:
        with suppress(OSError):  # the failure on its way up says more; `publish` and `gc` sweep what stays
            temporary.unlink(missing_ok=True)


def atomic_symlink(path: Path, target: str) -> None:
    """Makes `path` a link to `target`, in place of the link that was there. Raises the plain `OSError`."""
    temporary = _temporary_for(path)
    try:
        os.symlink(target, temporary)
        replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
