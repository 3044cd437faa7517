"""Cache of the preflight: results by file path, so that a second preflight needs only one `stat` call per file.

An entry is valid while size, mtime, ctime and inode are unchanged. A cache that cannot be read is ignored. The cache may be deleted
at any time. It is JSON, never pickle. Ultralytics' labels.cache is not read.
"""

from __future__ import annotations

import json
import os
import stat as stat_module
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1  # increase this number when data/images.py or runtime/measure/labels.py changes its result for a file


@dataclass(frozen=True)
class Stamp:
    """Size, times and inode of a file. Every edit changes one of these values. An edit that restores the mtime changes the ctime."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @staticmethod
    def of(path: Path | str) -> Stamp:
        """Return the stamp of the regular file at `path`.

        Raises:
            OSError: The file cannot be read, or is a folder, pipe or device.
        """
        s = os.stat(path)
        if not stat_module.S_ISREG(s.st_mode):
            raise OSError(0, "not a regular file")
        return Stamp(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)

    def as_list(self) -> list[int]:
        return [self.size, self.mtime_ns, self.ctime_ns, self.inode]


class FileCache:
    """Cache of JSON values by (kind, absolute path). A value is valid for one stamp of the file. If `file` is None, start empty."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.entries: dict[str, list[Any]] = {}
        self.changed = False
        if file is None:
            return
        try:
            stored = json.loads(file.read_bytes())
            if stored["version"] == VERSION and isinstance(stored["files"], dict):
                self.entries = stored["files"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return

    def get(self, kind: str, path: Path, stamp: Stamp, read: Callable[[Any], Any]) -> Any:
        """Return the cached value, converted by `read`. None: no value is stored for this stamp, or `read` failed."""
        try:
            known, value = self.entries[f"{kind}:{path}"]
            return read(value) if known == stamp.as_list() else None
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            return None

    def put(self, kind: str, path: Path, stamp: Stamp, value: Any) -> None:
        self.entries[f"{kind}:{path}"] = [stamp.as_list(), value]
        self.changed = True

    def save(self) -> None:
        """Write the cache to its file if a value changed.

        Raises:
            StorageError: The folder cannot be written.
        """
        if self.file is None or not self.changed:
            return
        from yolo_compress.files.atomic import atomic_write

        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.file, json.dumps({"version": VERSION, "files": self.entries}, separators=(",", ":")))
        self.changed = False
