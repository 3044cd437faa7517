"""Cache of the preflight: results by file path, so that a second preflight needs only one `stat` call per file.

A result is valid while size, mtime, ctime and inode of its file are unchanged. The cache is one binary file of arrays. A preflight
that has not ended adds its results in parts beside it: `data.cache.part-...`. A file that cannot be read is ignored, and it is safe
to delete all of them. Ultralytics' labels.cache is not read.

A file has a line of JSON and four sections, whose sizes and checksum the line gives: the paths, each ended by a zero byte, a `RESULT`
for each path, the boxes of the label files, and JSON. The JSON has the kinds of the results, one after the other, with the size of
their paths, then texts and digests.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yolo_compress.errors import StorageError

VERSION = 2  # increase this number when data/images.py or runtime/measure/labels.py changes its result for a file
RESULT = np.dtype(
    [
        ("stamp", "<i8", 4),
        ("sha256", "u1", 32),
        ("size", "<i4", 2),  # width and height of an image, px
        ("first", "<i8"),  # the boxes of a label file are rows first to first + count
        ("count", "<i8"),
    ]
)
Lines = Sequence[tuple[int, str]]  # line of the file, and text
Texts = dict[str, dict[str, Sequence[Lines]]]  # kind -> path -> [findings, notes]
MAX_DIGESTS = 1000  # digests of data sets and of their subsets; the oldest are dropped


class Found(NamedTuple):
    """What was found in a file: its SHA-256, and the size of an image or the boxes of a label file."""

    sha256: bytes
    size: tuple[int, int] = (0, 0)
    boxes: Sequence[tuple[float, ...]] = ()
    findings: Lines = ()
    notes: Lines = ()


def stamps(paths: Iterable[str]) -> tuple[np.ndarray, dict[int, OSError]]:
    """Return stamps_N4, int64: size, mtime, ctime and inode of each file. ctime also shows edits that restore the mtime.

    The stamp of a file that cannot be read, or that is a folder, pipe or device, is 0. The second result has the errors by index.
    """
    flat, failed = array("q"), dict[int, OSError]()
    for i, path in enumerate(paths):
        try:
            s = os.stat(path)
            if not stat.S_ISREG(s.st_mode):
                raise OSError(0, "not a regular file")
            flat.extend((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino & (1 << 63) - 1))
        except OSError as error:
            failed[i] = error.with_traceback(None)
            flat.extend((0, 0, 0, 0))
    return np.frombuffer(flat, np.int64).reshape(-1, 4), failed


class FileCache:
    """Results by kind and absolute path of the file. If `file` is None, the cache starts empty and is not written.

    Attributes:
        records: `RESULT` of each row.
        boxes_B5: boxes of all label files.
        texts: findings and notes of the few files that have some.
        digests: digests of data sets, by a hash of what they cover.
        unwritten: why the cache could not be written; None if it could.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.records, self.boxes_B5 = np.zeros(0, RESULT), np.zeros((0, 5))
        self.texts: Texts = {}
        self.digests: dict[str, str] = {}
        self.unwritten: str | None = None
        self._rows: dict[str, dict[str, int]] = {}  # kind -> path -> row
        self._joined: Mapping[str, bytes | memoryview] = {}  # kind -> paths as in the file, until `_rows` is needed
        self._changed = False
        self._new: dict[tuple[str, str], tuple[np.ndarray, Found]] = {}
        self._parts: list[Path] = []
        if file is None:
            return
        with suppress(OSError):
            self._parts = sorted(file.parent.glob(f"{file.name}.part-*"))
        for path in (file, *self._parts):
            with suppress(OSError):
                if content := _decoded(path.read_bytes()):
                    self._add(content)

    def find(self, kind: str, paths: Sequence[str], stamps_N4: np.ndarray) -> np.ndarray:
        """Return the row in `records` of each file. -1: no result is stored for this stamp."""
        first = 0
        if not paths:
            return np.zeros(0, np.int64)
        for other, joined in self._joined.items():
            count = bytes(joined).count(0)
            if other == kind and count == len(paths) and _joined(paths) == joined:
                rows = np.arange(first, first + count)
                break
            first += count
        else:
            self._split()
            known = self._rows.get(kind, {})
            rows = np.array([known.get(path, -1) for path in paths], np.int64)
        there = np.flatnonzero(rows >= 0)
        rows[there[(self.records["stamp"][rows[there]] != stamps_N4[there]).any(axis=1)]] = -1
        return rows

    def put(self, kind: str, path: str, stamp: np.ndarray, found: Found) -> None:
        """Add a result. `find` sees it after `save` or `save_part`."""
        self._new[kind, path] = stamp, found

    def digest(self, content: str, compute: Callable[[], str]) -> str:
        """Return the digest of a data set with this content (a hash), computed only if it is not stored."""
        if content not in self.digests:
            self.digests[content] = compute()
            self._changed = True
        return self.digests[content]

    def save_part(self) -> None:
        """Write the new results into a file of their own, so that a kill does not lose them."""
        new = self._take()
        if self.file is not None and len(new.records):
            part = self.file.with_name(f"{self.file.name}.part-{os.getpid()}-{len(self._parts)}")
            if self._write(part, new):
                self._parts.append(part)

    def save(self) -> None:
        """Write all results into the cache's file if any changed, and delete the parts."""
        self._take()
        if self.file is None or not (self._changed or self._parts):
            return
        self._split()
        records = self.records[[row for paths in self._rows.values() for row in paths.values()]]
        boxes_B5 = gathered(self.boxes_B5, records)
        records["first"] = np.cumsum(records["count"]) - records["count"]
        joined = {kind: _joined(paths) for kind, paths in self._rows.items()}
        digests = dict(list(self.digests.items())[-MAX_DIGESTS:])
        if self._write(self.file, _Content(joined, records, boxes_B5, self.texts, digests)):
            for part in self._parts:
                part.unlink(missing_ok=True)
            self._parts, self._changed = [], False

    def _take(self) -> _Content:
        """Move the new results to the rows. Return them."""
        new = sorted(self._new.items(), key=lambda item: item[0][0])  # by kind, else in their order
        records, boxes = np.zeros(len(new), RESULT), [np.zeros((0, 5))]
        paths, texts = dict[str, list[str]](), Texts()
        for i, ((kind, path), (stamp, found)) in enumerate(new):
            paths.setdefault(kind, []).append(path)
            records[i] = stamp, np.frombuffer(found.sha256, np.uint8), found.size, 0, len(found.boxes)
            if found.boxes:
                boxes.append(np.array(found.boxes, np.float64))
            if found.findings or found.notes:
                texts.setdefault(kind, {})[path] = [found.findings, found.notes]
        records["first"] = np.cumsum(records["count"]) - records["count"]
        content = _Content(
            {kind: _joined(own) for kind, own in paths.items()}, records, np.concatenate(boxes), texts, {}
        )
        self._new, self._changed = {}, self._changed or bool(new)
        self._add(content)
        return content

    def _add(self, more: _Content) -> None:
        """Add results, which replace those of the same files."""
        if not len(more.records) and not more.digests:
            return
        records, boxes_B5 = more.records, more.boxes_B5
        if len(self.records):
            records = records.copy()
            records["first"] += len(self.boxes_B5)
            records, boxes_B5 = np.concatenate([self.records, records]), np.concatenate([self.boxes_B5, boxes_B5])
            self._split()
        first = len(self.records)
        self.records, self.boxes_B5, self._joined = records, boxes_B5, more.joined
        if first:
            self._split(first)
        for kind, joined in more.joined.items():
            for path in self.texts.get(kind, {}).keys() & _separate(joined) if self.texts else ():
                del self.texts[kind][path]
        for kind, texts in more.texts.items():
            self.texts.setdefault(kind, {}).update(texts)
        self.digests |= more.digests

    def _split(self, row: int = 0) -> None:
        """Move `_joined` to `_rows`. `row` is the row of the first path."""
        for kind, joined in self._joined.items():
            paths = _separate(joined)
            self._rows.setdefault(kind, {}).update(zip(paths, range(row, row + len(paths)), strict=True))
            row += len(paths)
        self._joined = {}

    def _write(self, file: Path, content: _Content) -> bool:
        """Write a file. Return whether that was possible."""
        from yolo_compress.files.atomic import atomic_write

        kinds = {kind: len(joined) for kind, joined in content.joined.items()}
        text = json.dumps([kinds, content.texts, content.digests]).encode()
        numbers = [content.records.view(np.uint8), content.boxes_B5.reshape(-1).view(np.uint8)]
        sections: list[Any] = [b"".join(content.joined.values()), *numbers, text]
        lengths = [len(section) for section in sections]
        head = {"version": VERSION, "lengths": lengths, "crc32": _checksum(lengths, sections)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, b"".join([json.dumps(head).encode(), b"\n", *sections]))
        except (StorageError, OSError) as error:
            self.unwritten = str(error)
            return False
        return True


class _Content(NamedTuple):
    """Content of a file. The records are those of the paths in `joined` (kind -> paths, each ended by a zero byte)."""

    joined: Mapping[str, bytes | memoryview]
    records: np.ndarray
    boxes_B5: np.ndarray
    texts: Texts
    digests: dict[str, str]


def _joined(paths: Iterable[str]) -> bytes:
    return os.fsencode("\0".join([*paths, ""]))


def _separate(joined: bytes | memoryview) -> list[str]:
    return os.fsdecode(bytes(joined)).split("\0")[:-1]


def gathered(boxes_B5: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Return the boxes of the records, in their order; a view if they are already in this order."""
    records = records[records["count"] > 0]
    firsts, counts = records["first"], records["count"]
    ends = firsts + counts
    if (firsts[1:] == ends[:-1]).all():
        return boxes_B5[firsts[0] : ends[-1]] if len(records) else boxes_B5[:0]
    moved = np.repeat(firsts - np.cumsum(counts) + counts, counts)
    return boxes_B5[moved + np.arange(len(moved))]


def _checksum(lengths: Sequence[int], sections: Iterable[Any]) -> int:
    value = zlib.crc32(json.dumps(lengths).encode())
    for section in sections:
        value = zlib.crc32(section, value)
    return value


def _decoded(data: bytes) -> _Content | None:
    """Return the content of a cache file, which shares the memory of `data`. None: it is no such file, or is damaged."""
    line = data[: data.find(b"\n") + 1]
    body = memoryview(data)[len(line) :]
    try:
        head = json.loads(line)
        if head["version"] != VERSION or head["crc32"] != _checksum(head["lengths"], [body]):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    paths, records, boxes_B5, text = _cut(body, head["lengths"])
    kinds, texts, digests = json.loads(bytes(text))
    joined = dict(zip(kinds, _cut(paths, kinds.values()), strict=True))
    return _Content(joined, np.frombuffer(records, RESULT), np.frombuffer(boxes_B5).reshape(-1, 5), texts, digests)


def _cut(data: memoryview, lengths: Iterable[int]) -> list[memoryview]:
    lengths = list(lengths)
    return [data[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def cannot_read(path: str, error: OSError) -> str:
    """Return why a file cannot be read."""
    if error.errno == errno.ENOENT:
        return "dangling symbolic link" if os.path.islink(path) else "no such file"
    return error.strerror or str(error)
