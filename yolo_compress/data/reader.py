"""Read and check images and their labels, in threads and with a cache. Each image becomes a sample or a list of findings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolo_compress.data import images
from yolo_compress.data.cache import FileCache, Stamp
from yolo_compress.data.data_yaml import DataYaml, Listed, shown
from yolo_compress.runtime.measure import labels
from yolo_compress.runtime.measure.labels import label_path

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """One image with its boxes. Width and height are in px as `cv2.imread` decodes it; boxes are (class, cx, cy, w, h), 0..1."""

    image: Path
    width: int
    height: int
    boxes: tuple[labels.Box, ...]
    sha256: str
    name: str = ""  # path relative to the data root, with slashes; part of the digest


@dataclass(frozen=True)
class FileState:
    """State of an image or label file when it was read. `sha256` is None for a label file that did not exist."""

    path: Path
    stamp: Stamp | None
    sha256: str | None


@dataclass
class Read:
    """Result for one image: a sample, or findings. `files` are the image file and the label file."""

    listed: Listed
    sample: Sample | None = None
    labelled: bool = False
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[FileState] = field(default_factory=list)


class _NotCached(Exception):
    """A file is not in the cache, and the caller asked not to read it."""


class Reader:
    """Reads and checks images and labels, and caches the results. If `labelled` is False, it reads only images."""

    def __init__(self, data: DataYaml, store: FileCache, labelled: bool = True) -> None:
        self.data, self.store, self.labelled = data, store, labelled
        self.kind = f"labels/{len(data.names)}/{data.pose_columns}"  # the result for a label file also depends on these

    def read_all(self, listed: Sequence[Listed], progress: Progress | None) -> list[Read]:
        """Return the results for the images in `listed`, in that order. Files that are not in the cache are read in threads."""
        out = [self._cached(item) for item in listed]
        todo = [i for i, result in enumerate(out) if result is None]
        done = len(out) - len(todo)
        if progress and done:
            progress(done, len(out))
        if todo:
            with images.quiet_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                try:
                    for i, result in zip(todo, pool.map(self._read, (listed[i] for i in todo)), strict=True):
                        out[i], done = result, done + 1
                        if progress:
                            progress(done, len(out))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        return [result for result in out if result]

    def _cached(self, listed: Listed) -> Read | None:
        try:
            return self._read(listed, may_read=False)
        except _NotCached:
            return None

    def _read(self, listed: Listed, may_read: bool = True) -> Read:
        out, path = Read(listed), listed.path
        size = self._image(out, path, listed.source, may_read)
        boxes = self._labels(out, label_path(path), may_read) if self.labelled else ()
        if not out.findings:
            out.sample = Sample(path, *size, boxes, out.files[0].sha256 or "", listed.name)
        return out

    def _image(self, out: Read, path: Path, source: str, may_read: bool) -> tuple[int, int]:
        try:
            stamp = Stamp.of(path)
            known = self.store.get("image", path, stamp, _stored_image)
            if known is None:
                data = _bytes(path, may_read)
                width, height, what = 0, 0, None
                try:
                    width, height = images.probe(data)
                except images.Finding as e:
                    what = str(e)
                known = hashlib.sha256(data).hexdigest(), width, height, what
                self.store.put("image", path, stamp, known)
        except OSError as e:
            where = f"{source}: {shown(path)}" if source.rpartition(":")[2].isdigit() else shown(path)
            out.findings.append(f"{where}: {_reason(path, e)}")
            return 0, 0
        sha256, width, height, what = known
        if what is not None:
            out.findings.append(f"{shown(path)}: {what}")
        out.files.append(FileState(path, stamp, sha256))
        return width, height

    def _labels(self, out: Read, path: Path, may_read: bool) -> tuple[labels.Box, ...]:
        if not os.path.lexists(path):
            out.files.append(FileState(path, None, None))
            return ()
        out.labelled = True
        try:
            stamp = Stamp.of(path)
            known = self.store.get(self.kind, path, stamp, _stored_labels)
            if known is None:
                data = _bytes(path, may_read)
                parsed = labels.parse(data, len(self.data.names), self.data.pose_columns)
                known = hashlib.sha256(data).hexdigest(), parsed
                self.store.put(self.kind, path, stamp, [known[0], parsed.boxes, parsed.findings, parsed.notes])
        except OSError as e:
            out.findings.append(f"{shown(path)}: {_reason(path, e)}")
            return ()
        out.findings += [f"{shown(path)}:{line}: {what}" for line, what in known[1].findings]
        out.notes += [f"{shown(path)}:{line}: {what}" for line, what in known[1].notes]
        out.files.append(FileState(path, stamp, known[0]))
        return tuple(known[1].boxes)


def _bytes(path: Path, may_read: bool) -> bytes:
    if not may_read:
        raise _NotCached
    return path.read_bytes()


def _stored_image(value: list[Any]) -> tuple[str, int, int, str | None]:
    sha256, width, height, what = value
    return str(sha256), int(width), int(height), None if what is None else str(what)


def _stored_labels(value: list[Any]) -> tuple[str, labels.Labels]:
    boxes = [(int(c), float(x), float(y), float(w), float(h)) for c, x, y, w, h in value[1]]
    findings, notes = ([(int(line), str(what)) for line, what in part] for part in value[2:4])
    return str(value[0]), labels.Labels(boxes, findings, notes)


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "dangling symbolic link" if path.is_symlink() else "no such file"
    return error.strerror or str(error)
