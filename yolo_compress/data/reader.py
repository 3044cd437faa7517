"""Read and check images and their labels, in threads and with a cache."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from yolo_compress.data import images
from yolo_compress.data.cache import RESULT, FileCache, Found, cannot_read, gathered, stamps
from yolo_compress.data.data_yaml import DataYaml, Listed, shown
from yolo_compress.data.samples import FileStates, Samples
from yolo_compress.progress import bar
from yolo_compress.runtime.measure import labels
from yolo_compress.runtime.measure.device import usable_cpus
from yolo_compress.runtime.measure.labels import label_file

# Images that a thread reads in one go. Threads that take turns for each small file are slower than one thread.
BLOCK = 64
SAVE_SECONDS = 10.0  # a kill loses the work of about this time
SHOWN_FROM = 1000  # with fewer images to read, there is no progress bar


@dataclass(frozen=True)
class Read:
    """Results for images, in the order of `listed`. Findings and notes are by the index of the image.

    `image_N` and `label_N` are rows of `cache.RESULT`, 0 for a file that does not exist or cannot be read. The boxes of image i are
    the rows of `boxes_B5` that `label_N[i]` names.
    """

    listed: Sequence[Listed]
    image_N: np.ndarray
    label_N: np.ndarray
    boxes_B5: np.ndarray
    label_paths: list[str]  # empty if labels were not to be read
    labelled_N: np.ndarray  # whether there is a label file
    findings: dict[int, list[str]] = field(default_factory=dict)
    notes: dict[int, list[str]] = field(default_factory=dict)

    def samples(self, chosen: Sequence[int]) -> Samples:
        """Return the samples of the images with these indices."""
        image_N, label_N = self.image_N[chosen], self.label_N[chosen]
        listed = [self.listed[i] for i in chosen]
        starts = np.concatenate([[0], np.cumsum(label_N["count"])])
        return Samples(
            [one.path for one in listed],
            [one.name for one in listed],
            image_N["size"].copy(),
            image_N["sha256"].copy(),
            starts,
            gathered(self.boxes_B5, label_N),
        )

    def states(self, chosen: Sequence[int]) -> FileStates:
        """Return the states of image and label files of the images with these indices."""
        paths = [self.listed[i].path for i in chosen] + [self.label_paths[i] for i in chosen if self.label_paths]
        both = [self.image_N[chosen], self.label_N[chosen if self.label_paths else []]]
        rows = np.concatenate(both)
        return FileStates(paths, rows["stamp"].copy(), rows["sha256"].copy())


@dataclass
class _Files:
    """Files of one kind: images, or label files of a number of classes. `rows` are rows of the cache, -1 if there is none."""

    kind: str
    paths: list[str]
    stamps_N4: np.ndarray
    failed: dict[int, OSError]
    rows: np.ndarray

    def find(self, cache: FileCache) -> None:
        """Set `rows` from the cache. Files that cannot be read are not asked for, so that the paths are those of the cache."""
        there = np.setdiff1d(np.arange(len(self.paths)), list(self.failed))
        paths = [self.paths[i] for i in there.tolist()] if self.failed else self.paths
        self.rows[there] = cache.find(self.kind, paths, self.stamps_N4[there])

    def unread(self) -> set[int]:
        return set(np.flatnonzero(self.rows < 0).tolist()) - self.failed.keys()


def read_all(listed: Sequence[Listed], data: DataYaml, cache: FileCache, labelled: bool = True) -> Read:
    """Read and check images and, if `labelled`, their labels. Files that are not in the cache are read in threads.

    The results are saved in the cache as they come, so a preflight that was killed continues where it was.
    """
    paths = [one.path for one in listed]
    label_paths = [label_file(path) for path in paths] if labelled else []
    kind = f"labels/{len(data.names)}/{data.pose_columns}"  # the result for a label file also depends on these
    files = [_files(cache, "image", paths), _files(cache, kind, label_paths)]
    absent = {i for i in files[1].failed if not os.path.lexists(label_paths[i])}
    unread = [part.unread() for part in files]
    if any(unread):
        _read_missing(files, unread, data, cache, len(listed))
    image_N, label_N = np.zeros(len(listed), RESULT), np.zeros(len(listed), RESULT)
    findings, notes = dict[int, list[str]](), dict[int, list[str]]()
    for number, part in enumerate(files):
        if unread[number]:
            part.find(cache)
        there = part.rows >= 0
        (label_N if number else image_N)[np.flatnonzero(there)] = cache.records[part.rows[there]]
        for i, failure in part.failed.items():
            if number == 0 or i not in absent:
                where = f"{listed[i].source}: " if number == 0 and listed[i].source.rpartition(":")[2].isdigit() else ""
                findings.setdefault(i, []).append(
                    f"{where}{shown(part.paths[i])}: {cannot_read(part.paths[i], failure)}"
                )
        texts = cache.texts.get(part.kind, {})
        for i, path in enumerate(part.paths) if texts else ():
            if there[i] and (text := texts.get(path)):
                for out, lines in zip((findings, notes), text, strict=True):
                    for line, what in lines:
                        out.setdefault(i, []).append(f"{shown(path)}{f':{line}' if number else ''}: {what}")
    labelled_N = np.ones(len(listed), bool)
    labelled_N[list(absent)] = False
    return Read(listed, image_N, label_N, cache.boxes_B5, label_paths, labelled_N, findings, notes)


def _files(cache: FileCache, kind: str, paths: list[str]) -> _Files:
    stamps_N4, failed = stamps(paths)
    files = _Files(kind, paths, stamps_N4, failed, np.full(len(paths), -1))
    files.find(cache)
    return files


def _read_missing(
    files: Sequence[_Files], unread: Sequence[set[int]], data: DataYaml, cache: FileCache, count: int
) -> None:
    """Read the files that are not in the cache, and put the results into it. Add files that cannot be read to `failed`."""
    todo = sorted(set().union(*unread))

    def read_block(block: Sequence[int]) -> list[tuple[int, int, Found | OSError]]:
        out: list[tuple[int, int, Found | OSError]] = []
        for i in block:
            for number, part in enumerate(files):
                if i in unread[number]:
                    try:
                        content = Path(part.paths[i]).read_bytes()
                        out.append((number, i, _labels(content, data) if number else _image(content)))
                    except OSError as error:
                        out.append((number, i, error.with_traceback(None)))
        return out

    blocks = [todo[i : i + BLOCK] for i in range(0, len(todo), BLOCK)]
    shown_bar = bar("check images", count, "image", count - len(todo), SHOWN_FROM)
    with images.quiet_pillow(), shown_bar as advance, ThreadPoolExecutor(usable_cpus()) as pool:
        saved = time.monotonic()
        try:
            for block, results in zip(blocks, pool.map(read_block, blocks), strict=True):
                for number, i, found in results:
                    part = files[number]
                    if isinstance(found, OSError):
                        part.failed[i] = found
                    else:
                        cache.put(part.kind, part.paths[i], part.stamps_N4[i], found)
                if time.monotonic() - saved > SAVE_SECONDS:
                    cache.save_part()
                    saved = time.monotonic()
                advance(len(block))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            cache.save_part()
            raise
    cache.save()


def _image(content: bytes) -> Found:
    sha256 = hashlib.sha256(content).digest()
    try:
        return Found(sha256, images.probe(content))
    except images.Finding as error:
        return Found(sha256, findings=[(0, str(error))])


def _labels(content: bytes, data: DataYaml) -> Found:
    parsed = labels.parse(content, len(data.names), data.pose_columns)
    return Found(hashlib.sha256(content).digest(), (0, 0), parsed.boxes, parsed.findings, parsed.notes)
