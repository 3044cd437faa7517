"""Check every image and label of a data set before any training (preflight), and compute the digest of each split.

Ultralytics leaves out files that it cannot read, and reports mAP over the rest. Here a finding stops the run. If `on_bad` is
"skip", the image of the finding is left out for every model. Folders and labels follow the rules of Ultralytics; see labels.py
and images.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from yolo_compress.data import shipped
from yolo_compress.data.cache import FileCache, Stamp
from yolo_compress.data.data_yaml import DataYaml, Listed, data_folders, find_yaml, list_images, read_yaml, shown
from yolo_compress.data.reader import FileState, Progress, Read, Reader, Sample, label_path
from yolo_compress.errors import DataError, RecipeError, StorageError
from yolo_compress.runtime.max_detections import MAX_DET, counted

__all__ = [
    "BadData",
    "Dataset",
    "Sample",
    "calibration_subset",
    "find_yaml",
    "load",
    "recheck",
    "with_held_back",
    "with_unlabelled",
]

MAX_UNLABELLED = 0.3
LISTED_FINDINGS = 10  # largest number of findings in an error message; BadData.findings has all of them


class BadData(DataError):
    """Some files of a data set cannot be used. `findings` has one line per fault: "path:line: what is wrong"."""

    def __init__(self, message: str, findings: Sequence[str]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


@dataclass(frozen=True)
class Dataset:
    """A data set that passed the preflight: class names, training and validation images with their boxes, and digests.

    The digests depend on class names, image bytes, boxes, and file names relative to the data root.
    """

    yaml: Path
    names: tuple[str, ...]
    channels: int
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    skipped: tuple[str, ...]  # findings about the images that were left out
    notes: tuple[str, ...]  # messages about what was accepted: background images, repeated rows, classes without a box
    digest: str
    train_digest: str
    val_digest: str
    files: tuple[FileState, ...] = field(repr=False, compare=False, default=())
    unlabelled: tuple[Sample, ...] = ()  # images of another folder, see `with_unlabelled`; not part of `digest`
    unlabelled_digest: str = ""
    held: tuple[Sample, ...] = ()  # training images that no stage trains on, see `with_held_back`


def load(
    name: str,
    *,
    on_bad: Literal["error", "skip"] = "error",
    allow_overlap: bool = False,
    limit_train: int | None = None,
    limit_val: int | None = None,
    max_unlabelled: float = MAX_UNLABELLED,
    max_det: int = MAX_DET,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Find, read and check the data set of the yaml `name`.

    Args:
        name: Path of a data yaml, or its name in `datasets/`, in a folder of YOLO_COMPRESS_DATA or among the shipped
            yamls. The digits of the shipped yaml are drawn first if they do not exist.
        on_bad: "skip" leaves out images with a finding, and lists the findings in `skipped`.
        allow_overlap: Accept validation images that are also training images.
        limit_train: Number of training images to read, evenly spaced in the sorted list (`i * len // limit`).
        limit_val: Number of validation images to read, chosen in the same way.
        max_unlabelled: Largest fraction of the images of a split that may have no label file. They are background.
        max_det: Number of detections that NMS keeps in an image. Images with more objects give a note.
        cache: JSON file with the results of earlier preflights.
        progress: Called with (images done, all images).

    Raises:
        RecipeError: The data yaml does not exist, or a limit is below 1.
        BadData: There are findings. The message has the first ten.
        DataError: The yaml is malformed. Or a split is empty, has no box, or has more images without a label file than
            `max_unlabelled` allows.
        StorageError: The digits cannot be drawn.
    """
    file = find_yaml(name)
    if file == shipped.DIGITS and not any((folder / file.stem).is_dir() for folder in data_folders()):
        shipped.draw_digits()
    data = read_yaml(file)
    listings = [list_images(data, "train"), list_images(data, "val")]
    findings = [finding for listing in listings for finding in listing.findings]
    listed = [
        _evenly_spaced(split, limit, key)
        for (split, *_), limit, key in zip(
            listings, (limit_train, limit_val), ("limit_train", "limit_val"), strict=True
        )
    ]
    for split, entry, listing in zip(("train", "val"), (data.train, data.val), listings, strict=True):
        if not listing.images:
            raise DataError(f"{shown(data.file)}: {split}: no image in {', '.join(entry)}" + _lines(listing.findings))

    read, notes = _read([*listed[0], *listed[1]], data, cache, progress)
    notes += [note for listing in listings for note in listing.notes]
    first_val = len(listed[0])
    train, val = read[:first_val], read[first_val:]
    findings += _repeated(val)
    findings += [finding for result in read for finding in result.findings]
    findings += _almost_labels(read)
    findings = list(dict.fromkeys(findings))
    if findings and on_bad != "skip":
        raise _failure(data, findings, "fix them, or set data.on_bad=skip to leave these images out of every model")
    notes += dict.fromkeys(note for result in read for note in result.notes)

    used = [[r for r in split if r.sample] for split in (train, _without_repeats(val))]
    samples = [tuple(r.sample for r in split if r.sample) for split in used]
    for split, results, images, limit in zip(("train", "val"), used, samples, (limit_train, limit_val), strict=True):
        notes += _check_split(data, split, results, images, findings, limit, max_unlabelled, max_det)
    notes += _overlap(data, *samples, allow=allow_overlap)
    train_digest, val_digest = (_digest(split, data) for split in samples)
    files = {state.path: state for split in used for result in split for state in result.files}
    return Dataset(
        yaml=data.file,
        names=data.names,
        channels=data.channels,
        train=samples[0],
        val=samples[1],
        skipped=tuple(findings),
        notes=tuple(notes),
        digest=_sha256([train_digest, val_digest]),
        train_digest=train_digest,
        val_digest=val_digest,
        files=tuple(files.values()),
    )


def with_unlabelled(
    dataset: Dataset,
    folder: str,
    *,
    on_bad: Literal["error", "skip"] = "error",
    allow_overlap: bool = False,
    cache: Path | None = None,
) -> Dataset:
    """Return the data set with the images of `folder` added as `unlabelled`. Label files in the folder are not read.

    Raises:
        DataError: The folder does not exist, or has no image.
        BadData: Some images cannot be used, or are validation images.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise DataError(f"distill.images: no folder {shown(folder)}")
    data = replace(read_yaml(dataset.yaml), root=root, train=(".",))
    listed, findings, _ = list_images(data, "train")
    if not listed:
        raise DataError(f"distill.images: no image in {shown(folder)}" + _lines(findings))
    read, notes = _read(listed, data, cache, labelled=False)
    findings += [finding for result in read for finding in result.findings]
    where = replace(data, file=root)  # so that messages name the folder
    if findings and on_bad != "skip":
        raise _failure(where, findings, "fix them, or set data.on_bad=skip to leave these images out")
    samples = tuple(r.sample for r in read if r.sample)
    if not samples:
        raise _failure(where, findings, "no image is left")
    notes += _overlap(where, samples, dataset.val, allow=allow_overlap)
    files = {state.path: state for r in read if r.sample for state in r.files}
    return replace(
        dataset,
        unlabelled=samples,
        unlabelled_digest=_sha256(sorted([s.name, s.sha256] for s in samples)),
        skipped=(*dataset.skipped, *findings),
        notes=(*dataset.notes, *notes),
        files=(*dataset.files, *files.values()),
    )


def with_held_back(dataset: Dataset, share: float) -> Dataset:
    """Return the data set with a share of its training images moved from `train` to `held`.

    The images are chosen by their SHA-256, so copies of an image stay together. The choice needs no seed.

    Raises:
        DataError: `held` would have no image with a box, or `train` none.
    """
    ranked = sorted({_sha256(["held", sample.sha256]): sample.sha256 for sample in dataset.train}.items())
    chosen = {image for _, image in ranked[: round(share * len(ranked))]}
    held, train = ([s for s in dataset.train if (s.sha256 in chosen) == side] for side in (True, False))
    for what, samples in (("held back", held), ("left to train on", train)):
        if not any(sample.boxes for sample in samples):
            raise DataError(
                f"data.hold_back={share:g}: of {len(dataset.train)} training images, {len(samples)} are {what}, and none of them "
                "has an object; set another data.hold_back (0: no image is held back)"
            )
    return replace(dataset, train=tuple(train), held=tuple(held))


def _read(
    listed: Sequence[Listed],
    data: DataYaml,
    cache: Path | None,
    progress: Progress | None = None,
    labelled: bool = True,
) -> tuple[list[Read], list[str]]:
    """Read images and labels, with the cache if there is one. Return the results, and a note if the cache cannot be written."""
    store = FileCache(cache)
    read = Reader(data, store, labelled).read_all(listed, progress)
    try:
        store.save()
    except (StorageError, OSError) as e:
        return read, [f"the cache of the preflight was not written: {e}"]
    return read, []


def recheck(dataset: Dataset) -> None:
    """Check that no file of the data set changed since it was loaded. Only files with another size or time are read again.

    Raises:
        DataError: A file is missing, is new or has other bytes. The message names the first such file.
    """
    for state in dataset.files:
        what = None
        try:
            if Stamp.of(state.path) == state.stamp:
                continue
            if state.sha256 is None:
                what = "appeared"
            elif hashlib.sha256(state.path.read_bytes()).hexdigest() != state.sha256:
                what = "changed"
        except OSError as e:
            if state.sha256 is not None or os.path.lexists(state.path):
                what = f"is gone ({e.strerror})"
        if what:
            raise DataError(f"{shown(state.path)} {what} during the run; the results are not stored, run again")


def calibration_subset(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Return at most `count` samples for calibration, chosen by `seed` and sorted by name.

    The samples with the smallest sha256(seed, image) are chosen. If an image is added or removed, at most one chosen sample
    changes. The choice does not depend on the version of a random generator.

    Args:
        samples: Training samples. Never pass validation samples.
        count: Largest number of samples.
        seed: Seed of the choice.

    Raises:
        DataError: There is no sample, or `count` is below 1.
    """
    if not samples or count < 1:
        raise DataError(f"calibration needs at least one training image, got {min(len(samples), max(count, 0))}")
    ranked = sorted(samples, key=lambda s: (_sha256([seed, s.sha256]), s.name))
    return sorted(ranked[:count], key=lambda s: s.name)


def _evenly_spaced(listed: list[Listed], limit: int | None, key: str) -> list[Listed]:
    if limit is not None and limit < 1:
        raise RecipeError(f"data.{key} must be at least 1, not {limit}")
    if limit is None or limit >= len(listed):
        return listed
    return [listed[i * len(listed) // limit] for i in range(limit)]


def _repeated(results: Sequence[Read]) -> list[str]:
    """Return findings about validation images that are listed twice, because mAP would count them twice.

    Training images may be listed twice: this is oversampling.
    """
    first: dict[Path, str] = {}
    out = []
    for r in results:
        if r.listed.path in first:
            out.append(f"{r.listed.source}: {r.listed.name} is listed twice, first at {first[r.listed.path]}")
        first.setdefault(r.listed.path, r.listed.source)
    return out


def _without_repeats(results: Sequence[Read]) -> list[Read]:
    return list({r.listed.path: r for r in results}.values())


def _check_split(
    data: DataYaml,
    split: str,
    results: Sequence[Read],
    samples: Sequence[Sample],
    findings: list[str],
    limit: int | None,
    max_unlabelled: float,
    max_det: int,
) -> list[str]:
    """Check that a split has images, boxes and enough label files. Return notes about the split.

    Raises:
        DataError: The split has no image, no box, or too few label files.
    """
    if not samples:
        raise _failure(data, findings, f"no image of {split} is left")
    unlabelled = [r for r in results if not r.labelled]
    if len(unlabelled) == len(results):
        folder = shown(label_path(results[0].listed.path).parent)
        raise DataError(f"{shown(data.file)}: {split}: no image has a label file; searched in {folder}")
    if len(unlabelled) > max_unlabelled * len(results):
        first = shown(label_path(unlabelled[0].listed.path))
        raise DataError(
            f"{shown(data.file)}: {split}: {len(unlabelled)} of {len(results)} images have no label file, such as {first}. If all of "
            f"them are background, set data.max_unlabelled={math.ceil(100 * len(unlabelled) / len(results)) / 100:g}"
        )
    counts = [0] * len(data.names)
    for sample in samples:
        for box in sample.boxes:
            counts[box[0]] += 1
    if not any(counts):
        effect = "nothing to learn" if split == "train" else "nothing to evaluate"
        hint = "" if limit is None else f"; data.limit_{split}={limit} may have left out the images with objects"
        raise DataError(f"{shown(data.file)}: {split}: all {len(samples)} images are background, {effect}{hint}")
    notes = _crowded(samples, max_det) if split == "val" else []
    if background := sum(not s.boxes for s in samples):
        without = f"{len(unlabelled)} without label file"
        notes.append(f"{split}: {background} of {len(samples)} images are background ({without})")
    if absent := [name for name, count in zip(data.names, counts, strict=True) if not count]:
        effect = "their AP is undefined, and the mean ignores it" if split == "val" else "they cannot be learnt"
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        notes.append(f"{split}: no box of {', '.join(absent[:10])}{more}; {effect}")
    return notes


def _almost_labels(results: Sequence[Read]) -> list[str]:
    """Return findings about label files that are not read, because the upper or lower case of their names is wrong."""
    folders: dict[Path, dict[str, str]] = {}
    findings = []
    for result in results:
        if result.labelled:
            continue
        path = label_path(result.listed.path)
        if path.parent not in folders:
            names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
            folders[path.parent] = {name.lower(): name for name in names}
        if name := folders[path.parent].get(path.name.lower()):
            findings.append(
                f"{shown(path.with_name(name))}: not read; the label file of {result.listed.name} must be {path.name}"
            )
    return findings


def _crowded(samples: Sequence[Sample], max_det: int) -> list[str]:
    """Return notes about images with more objects than mAP counts or NMS keeps."""
    most, limit = (
        [max(Counter(box[0] for box in sample.boxes).values(), default=0) for sample in samples],
        counted(max_det),
    )
    notes = []
    if over := sum(count > limit for count in most):
        notes.append(
            f"val: {over} images have over {limit} objects of a class (up to {max(most)}), but mAP counts only the {limit} best "
            f"detections of a class in an image, so no model reaches mAP 1. Set data.max_det={max(MAX_DET + 1, 2 * max(most))} to "
            "count them all"
        )
    if over := sum(len(sample.boxes) > max_det for sample in samples):
        notes.append(
            f"val: {over} images have over {max_det} objects, but NMS keeps {max_det} detections of an image (data.max_det)"
        )
    return notes


def _overlap(data: DataYaml, train: Sequence[Sample], val: Sequence[Sample], *, allow: bool) -> list[str]:
    """Check that no validation image is a training image. Return a note if some are and `allow` is set.

    Raises:
        BadData: Some images are in both splits.
    """
    known = {s.sha256: s for s in train}
    pairs = [(known[s.sha256], s) for s in val if s.sha256 in known]
    if not pairs:
        return []
    if allow:
        return [f"{len(pairs)} of {len(val)} validation images are training images too; accepted by data.allow_overlap"]
    findings = [f"{shown(v.image)}: same bytes as {shown(t.image)} of train" for t, v in pairs]
    raise _failure(data, findings, "move them, or set data.allow_overlap=true and do not trust the mAP")


def _failure(data: DataYaml, findings: Iterable[str], hint: str) -> BadData:
    listed = list(findings)
    count = f"{len(listed)} finding{'s' if len(listed) != 1 else ''}"
    return BadData(f"{shown(data.file)}: {count}; {hint}" + _lines(listed), listed)


def _lines(findings: Sequence[str]) -> str:
    """Return text with the first findings as indented lines, and the number of further findings."""
    more = [f"... and {len(findings) - LISTED_FINDINGS} more"] if len(findings) > LISTED_FINDINGS else []
    return "".join(f"\n  {line}" for line in [*findings[:LISTED_FINDINGS], *more])


def _digest(samples: Sequence[Sample], data: DataYaml) -> str:
    rows = sorted([s.name, s.sha256, sorted(s.boxes)] for s in samples)
    return _sha256([list(data.names), data.channels, rows])


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
