"""Copy an untrusted bundle (folder or tar) into a new folder: only plain files, with limits for their size and number.

`tarfile` alone would extract links and unsafe paths, and its filters do not exist in Python 3.8. So each member is checked here.
"""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Set, Tuple

from ..errors import naming
from .signed_manifest import MADE_HERE, MANIFEST, BundleRefused

MAX_BYTES = 2 << 30  # sum of all files; a YOLOv8x in three precisions takes 0.5 GiB
MAX_FILES = 10000
_READ = 1 << 20  # bytes per read; also the largest tar header that is accepted
_MAX_DEPTH = 16

_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError)

_Member = Tuple[str, int, BinaryIO]


def unpack(bundle: Path, into: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> Path:
    """Copy the files of a bundle into a new folder and sync them to the disk.

    Args:
        bundle: a folder, a `.tar` or a `.tar.gz`.
        into: folder to create. It must not exist.
        max_bytes, max_files: limits. A larger bundle is refused.

    Returns:
        The folder that holds the manifest: `into`, or the only folder in it.

    Raises:
        BundleRefused: the bundle has absolute or `..` paths, links, devices, duplicate files or no manifest, is too large, or is a
            damaged archive.
        OSError: the bundle does not exist, or its files cannot be written.
    """
    os.mkdir(str(into), 0o755)
    if bundle.is_dir():
        _write(_of_folder(bundle), into, bundle, max_bytes, max_files)
    else:
        archive = _opened(bundle, max_bytes)
        try:
            _write(_of_tar(archive, bundle, max_files), into, bundle, max_bytes, max_files)
        except _DAMAGED as error:
            raise BundleRefused(f"{bundle}: damaged or incomplete tar ({error}); copy the bundle again") from error
        finally:
            archive.close()
    entries = os.listdir(str(into))
    root = into / entries[0] if MANIFEST not in entries and len(entries) == 1 else into
    if not (root / MANIFEST).is_file():
        raise BundleRefused(f"{bundle}: holds no {MANIFEST}; is it a bundle?")
    for name in MADE_HERE:  # the manifest does not cover these, so they must not come from outside
        if os.path.lexists(str(root / name)):
            raise BundleRefused(f"{bundle}: holds {name!r}, which only the robot's own commands make; refused")
    return root


def _write(members: Iterator[_Member], into: Path, bundle: Path, max_bytes: int, max_files: int) -> None:
    seen: Set[str] = set()
    total = 0
    for name, size, stream in members:
        total += size
        if name in seen:
            raise BundleRefused(f"{bundle}: {name!r} is there twice; refused")
        if total > max_bytes or len(seen) == max_files:
            raise BundleRefused(f"{bundle}: more than {max_files} files or {max_bytes} bytes; refused")
        seen.add(name)
        path = into / name
        try:
            os.makedirs(str(path.parent), 0o755, exist_ok=True)
            descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except (FileExistsError, NotADirectoryError) as error:
            raise BundleRefused(f"{bundle}: {name!r} is a file and a folder at once; refused") from error
        with naming(path), os.fdopen(descriptor, "wb") as out:
            _copy(stream, out, size, f"{bundle}: {name!r}")
            out.flush()
            os.fsync(out.fileno())


def _copy(stream: BinaryIO, out: BinaryIO, size: int, what: str) -> None:
    left = size
    while left:
        data = stream.read(min(_READ, left))
        if not data:
            raise BundleRefused(f"{what} ends after {size - left} of {size} bytes; copy the bundle again")
        out.write(data)
        left -= len(data)


def _of_folder(bundle: Path) -> Iterator[_Member]:
    """Yield the plain files of a bundle folder. Files that the robot's commands write (`MADE_HERE`) are left out.

    `signed_manifest.verify` checks all yielded files.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        for entry in sorted(os.listdir(str(bundle / folder))):
            name = folder + entry
            mode = os.lstat(str(bundle / name)).st_mode
            if name in MADE_HERE:
                continue
            if stat.S_ISDIR(mode) and name.count("/") < _MAX_DEPTH:
                waiting.append(name + "/")
            elif stat.S_ISREG(mode):
                with open(str(bundle / name), "rb") as stream:
                    yield name, os.fstat(stream.fileno()).st_size, stream
            else:
                raise BundleRefused(f"{bundle / name}: neither a plain file nor a folder; refused")


def _of_tar(archive: tarfile.TarFile, bundle: Path, max_files: int) -> Iterator[_Member]:
    for count, member in enumerate(archive):
        name = member.name[2:] if member.name.startswith("./") else member.name  # `tar -C bundle .` writes ./NAME
        parts = name.split("/")
        if count > 4 * max_files:
            raise BundleRefused(f"{bundle}: more than {count} entries; refused")
        if member.isdir() and name == ".":
            continue
        plain = all(part not in ("", ".", "..") for part in parts) and len(parts) <= _MAX_DEPTH
        if not plain or not name.isprintable() or "\\" in name:
            raise BundleRefused(f"{bundle}: {member.name!r} is no plain path below the bundle; refused")
        if member.isdir():
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
            raise BundleRefused(f"{bundle}: {member.name!r} is a link, a device or a sparse file; refused")
        stream: Any = archive.extractfile(member)
        yield name, member.size, stream


def _opened(bundle: Path, max_bytes: int) -> tarfile.TarFile:
    """Open a tar, plain or with gzip. The archive is read in pieces, and only up to a limit a little above `max_bytes`."""
    raw = open(str(bundle), "rb")
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    limited = _Limited(gzip.GzipFile(fileobj=raw) if zipped else raw, max_bytes + (64 << 20), bundle, raw.close)
    try:
        return _Archive(fileobj=limited, mode="r")  # type: ignore[arg-type]
    except BundleRefused:
        raw.close()
        raise
    except _DAMAGED as error:
        raw.close()
        raise BundleRefused(f"{bundle}: not a tar ({error}); a bundle is a folder, a .tar or a .tar.gz") from error


class _Archive(tarfile.TarFile):
    def close(self) -> None:
        """Close the archive and its file, which `TarFile` does not close."""
        super().close()
        self.fileobj.close()  # type: ignore[union-attr]


class _Limited:
    """A file that returns at most `_READ` bytes per call, and nothing beyond `limit`. A tar header may state any size."""

    def __init__(self, stream: Any, limit: int, bundle: Path, close: Callable[[], None]) -> None:
        self._stream, self._limit, self._bundle, self._close = stream, limit, bundle, close
        self.name = str(bundle)

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes."""
        if size < 0 or size > _READ:
            raise BundleRefused(f"{self._bundle}: a header of {size} bytes; refused")
        self._check(self._stream.tell() + size)
        return bytes(self._stream.read(size))

    def seek(self, position: int, whence: int = 0) -> int:
        """Seek within the limit. Seeking forward decompresses data, so the limit applies."""
        self._check(position)
        return int(self._stream.seek(position, whence))

    def tell(self) -> int:
        """Return the position in the decompressed archive, bytes."""
        return int(self._stream.tell())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._close()

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise BundleRefused(f"{self._bundle}: more than {self._limit} bytes unpacked; refused")
