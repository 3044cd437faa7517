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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from yolo_compress.data import shipped
from yolo_compress.data.data_yaml import DataYaml, Listed, data_folders, find_yaml, list_images, read_yaml, shown
from yolo_compress.data.samples import FileStates, Sample, Samples, sha256s
from yolo_compress.errors import DataError, RecipeError
from yolo_compress.runtime.max_detections import MAX_DET, counted

if TYPE_CHECKING:
    from yolo_compress.data.cache import FileCache
    from yolo_compress.data.reader import Read

__all__ = [
    "BadData", "Dataset", "Sample", "calibration_subset", "find_yaml", "load", "recheck", "with_held_back", "with_unlabelled",
]  # fmt: skip

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
    train: Sequence[Sample]
    val: Sequence[Sample]
    skipped: tuple[str, ...]  # findings about the images that were left out
    notes: tuple[str, ...]  # messages about what was accepted: background images, repeated rows, classes without a box
    digest: str
    train_digest: str
    val_digest: str
    files: tuple[FileStates, ...] = field(repr=False, compare=False, default=())
    unlabelled: Sequence[Sample] = ()  # images of another folder, see `with_unlabelled`; not part of `digest`
    unlabelled_digest: str = ""
    held: Sequence[Sample] = ()  # training images that no stage trains on, see `with_held_back`


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
) -> Dataset:
    """Find, read and check the data set of the yaml `name`. Files that the cache does not have are read with a progress bar.

    Args:
        name: Path of a data yaml, or its name in `datasets/`, in a folder of YOLO_COMPRESS_DATA or among the shipped
            yamls. The digits of the shipped yaml are drawn first if they do not exist.
        on_bad: "skip" leaves out images with a finding, and lists the findings in `skipped`.
        allow_overlap: Accept validation images that are also training images.
        limit_train: Number of training images to read, evenly spaced in the sorted list (`i * len // limit`).
        limit_val: Number of validation images to read, chosen in the same way.
        max_unlabelled: Largest fraction of the images of a split that may have no label file. They are background.
        max_det: Number of detections that NMS keeps in an image. Images with more objects give a note.
        cache: File with the results of earlier preflights; see `data.cache`.

    Raises:
        RecipeError: The data yaml does not exist, or a limit is below 1.
        BadData: There are findings. The message has the first ten.
        DataError: The yaml is malformed. Or a split is empty, has no box, or has more images without a label file than
            `max_unlabelled` allows.
        StorageError: The digits cannot be drawn.
    """
    file = find_yaml(name)
    if shipped.is_drawn(file) and not any((folder / file.stem).is_dir() for folder in data_folders()):
        shipped.draw_digits(file.stem)
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

    from yolo_compress.data.cache import FileCache  # imported here, because numpy takes time that `help` does not need
    from yolo_compress.data.reader import read_all

    store, first_val = FileCache(cache), len(listed[0])
    read = read_all([*listed[0], *listed[1]], data, store)
    notes = [note for listing in listings for note in listing.notes]
    train, val = range(first_val), range(first_val, len(read.listed))
    findings += _repeated(read.listed[first_val:])
    findings += [finding for i in sorted(read.findings) for finding in read.findings[i]]
    findings += _almost_labels(read)
    findings = list(dict.fromkeys(findings))
    if findings and on_bad != "skip":
        raise _failure(data, findings, "fix them, or set data.on_bad=skip to leave these images out of every model")
    notes += dict.fromkeys(note for i in sorted(read.notes) for note in read.notes[i])

    once = {read.listed[i].path: i for i in val}  # without repeated ones
    used = [[i for i in split if i not in read.findings] for split in (train, once.values())]
    samples = [read.samples(split) for split in used]
    for split, chosen, images, limit in zip(("train", "val"), used, samples, (limit_train, limit_val), strict=True):
        notes += _check_split(data, split, read, chosen, images, findings, limit, max_unlabelled, max_det)
    notes += _overlap(data, *samples, allow=allow_overlap)
    train_digest, val_digest = (_digest(split, data, store) for split in samples)
    store.save()
    if store.unwritten:
        notes.insert(0, f"the cache of the preflight was not written: {store.unwritten}")
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
        files=tuple(read.states(split) for split in used),
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
    from yolo_compress.data.cache import FileCache
    from yolo_compress.data.reader import read_all

    store = FileCache(cache)
    read = read_all(listed, data, store, labelled=False)
    findings += [finding for i in sorted(read.findings) for finding in read.findings[i]]
    where = replace(data, file=root)  # so that messages name the folder
    if findings and on_bad != "skip":
        raise _failure(where, findings, "fix them, or set data.on_bad=skip to leave these images out")
    used = [i for i in range(len(listed)) if i not in read.findings]
    if not used:
        raise _failure(where, findings, "no image is left")
    samples = read.samples(used)
    notes = _overlap(where, samples, dataset.val, allow=allow_overlap)
    digests = sha256s(samples)
    return replace(
        dataset,
        unlabelled=samples,
        unlabelled_digest=_sha256(sorted([name, digest] for name, digest in zip(samples.names, digests, strict=True))),
        skipped=(*dataset.skipped, *findings),
        notes=(*dataset.notes, *notes),
        files=(*dataset.files, read.states(used)),
    )


def with_held_back(dataset: Dataset, share: float) -> Dataset:
    """Return the data set with a share of its training images moved from `train` to `held`.

    The images are chosen by their SHA-256, so copies of an image stay together. The choice needs no seed.

    Raises:
        DataError: `held` or `train` would have no image with a box.
    """
    digests = sha256s(dataset.train)
    ranked = sorted(set(digests), key=lambda digest: _sha256(["held", digest]))
    chosen = set(ranked[: round(share * len(ranked))])
    parts = []
    for what, inside in (("held back", True), ("left to train on", False)):
        indices = [i for i, digest in enumerate(digests) if (digest in chosen) == inside]
        part = (
            dataset.train.only(indices) if isinstance(dataset.train, Samples) else [dataset.train[i] for i in indices]
        )
        if not any(sample.boxes for sample in part):
            raise DataError(
                f"data.hold_back={share:g}: of {len(digests)} training images, {len(part)} are {what}, and none of them has an "
                "object; set another data.hold_back (0: no image is held back)"
            )
        parts.append(part)
    return replace(dataset, held=parts[0], train=parts[1])


def recheck(dataset: Dataset) -> None:
    """Check that no file of the data set changed since it was loaded. Only files with another size or time are read again.

    Raises:
        DataError: A file is missing, is new or has other bytes. The message names the first such file.
    """
    from yolo_compress.data.cache import stamps

    for files in dataset.files:
        stamps_N4, failed = stamps(files.paths)
        for i in sorted({*(stamps_N4 != files.stamps_N4).any(axis=1).nonzero()[0].tolist(), *failed}):
            path, there = files.paths[i], files.stamps_N4[i].any()
            if i in failed:
                what = f"is gone ({failed[i].strerror})" if there or os.path.lexists(path) else None
            elif not there:
                what = "appeared"
            elif hashlib.sha256(Path(path).read_bytes()).digest() != files.sha256_N32[i].tobytes():
                what = "changed"
            else:
                what = None
            if what:
                raise DataError(f"{shown(path)} {what} during the run; the results are not stored, run again")


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
    names = samples.names if isinstance(samples, Samples) else [s.name for s in samples]
    ranked = sorted(
        (_sha256([seed, sha256]), name, i) for i, (sha256, name) in enumerate(zip(sha256s(samples), names, strict=True))
    )
    return [samples[i] for _, _, i in sorted(ranked[:count], key=lambda row: row[1])]


def _evenly_spaced(listed: list[Listed], limit: int | None, key: str) -> list[Listed]:
    if limit is not None and limit < 1:
        raise RecipeError(f"data.{key} must be at least 1, not {limit}")
    if limit is None or limit >= len(listed):
        return listed
    return [listed[i * len(listed) // limit] for i in range(limit)]


def _repeated(listed: Sequence[Listed]) -> list[str]:
    """Return findings about validation images that are listed twice, because mAP would count them twice.

    Training images may be listed twice: this is oversampling.
    """
    first: dict[str, str] = {}
    out = []
    for one in listed:
        if one.path in first:
            out.append(f"{one.source}: {one.name} is listed twice, first at {first[one.path]}")
        first.setdefault(one.path, one.source)
    return out


def _check_split(
    data: DataYaml,
    split: str,
    read: Read,
    chosen: Sequence[int],
    samples: Samples,
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
    unlabelled = [i for i in chosen if not read.labelled_N[i]]
    if len(unlabelled) == len(samples):
        folder = shown(os.path.dirname(read.label_paths[chosen[0]]))
        raise DataError(f"{shown(data.file)}: {split}: no image has a label file; searched in {folder}")
    if len(unlabelled) > max_unlabelled * len(samples):
        first = shown(read.label_paths[unlabelled[0]])
        raise DataError(
            f"{shown(data.file)}: {split}: {len(unlabelled)} of {len(samples)} images have no label file, such as {first}. If all of "
            f"them are background, set data.max_unlabelled={math.ceil(100 * len(unlabelled) / len(samples)) / 100:g}"
        )
    counts = samples.boxes_of(len(data.names))
    if not any(counts):
        effect = "nothing to learn" if split == "train" else "nothing to evaluate"
        hint = "" if limit is None else f"; data.limit_{split}={limit} may have left out the images with objects"
        raise DataError(f"{shown(data.file)}: {split}: all {len(samples)} images are background, {effect}{hint}")
    notes = _crowded(samples, max_det) if split == "val" else []
    if background := int((samples.counts() == 0).sum()):
        without = f"{len(unlabelled)} without label file"
        notes.append(f"{split}: {background} of {len(samples)} images are background ({without})")
    if absent := [name for name, count in zip(data.names, counts, strict=True) if not count]:
        effect = "their AP is undefined, and the mean ignores it" if split == "val" else "they cannot be learnt"
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        notes.append(f"{split}: no box of {', '.join(absent[:10])}{more}; {effect}")
    return notes


def _almost_labels(read: Read) -> list[str]:
    """Return findings about label files that are not read, because the upper or lower case of their names is wrong."""
    wanted: dict[str, dict[str, int]] = {}  # folder -> name of the label file in lower case -> index of the image
    for i in (~read.labelled_N).nonzero()[0].tolist():
        folder, name = os.path.split(read.label_paths[i])
        wanted.setdefault(folder, {})[name.lower()] = i
    findings = []
    for folder, names in wanted.items():
        others = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        alike = names.keys() & "/".join(others).lower().split("/")
        for other in others if alike else ():
            if other.lower() in alike:
                i = names[other.lower()]
                name = os.path.basename(read.label_paths[i])
                findings.append(
                    f"{shown(os.path.join(folder, other))}: not read; the label file of {read.listed[i].name} must be {name}"
                )
    return findings


def _crowded(samples: Samples, max_det: int) -> list[str]:
    """Return notes about images with more objects than mAP counts or NMS keeps."""
    most, limit = samples.most_of_a_class(), counted(max_det)
    notes = []
    if over := int((most > limit).sum()):
        notes.append(
            f"val: {over} images have over {limit} objects of a class (up to {max(most)}), but mAP counts only the {limit} best "
            f"detections of a class in an image, so no model reaches mAP 1. Set data.max_det={max(MAX_DET + 1, 2 * max(most))} to "
            "count them all"
        )
    if over := int((samples.counts() > max_det).sum()):
        notes.append(
            f"val: {over} images have over {max_det} objects, but NMS keeps {max_det} detections of an image (data.max_det)"
        )
    return notes


def _overlap(data: DataYaml, train: Samples, val: Sequence[Sample], *, allow: bool) -> list[str]:
    """Check that no validation image is a training image. Return a note if some are and `allow` is set.

    Raises:
        BadData: Some images are in both splits.
    """
    digests, others = sha256s(train), sha256s(val)
    both = set(digests).intersection(others)
    if not both:
        return []
    known = {sha256: path for sha256, path in zip(digests, train.paths, strict=True) if sha256 in both}
    pairs = [(known[sha256], val[i].image) for i, sha256 in enumerate(others) if sha256 in both]
    if allow:
        return [f"{len(pairs)} of {len(val)} validation images are training images too; accepted by data.allow_overlap"]
    findings = [f"{shown(v)}: same bytes as {shown(t)} of train" for t, v in pairs]
    raise _failure(data, findings, "move them, or set data.allow_overlap=true and do not trust the mAP")


def _failure(data: DataYaml, findings: Iterable[str], hint: str) -> BadData:
    listed = list(findings)
    count = f"{len(listed)} finding{'s' if len(listed) != 1 else ''}"
    return BadData(f"{shown(data.file)}: {count}; {hint}" + _lines(listed), listed)


def _lines(findings: Sequence[str]) -> str:
    """Return text with the first findings as indented lines, and the number of further findings."""
    more = [f"... and {len(findings) - LISTED_FINDINGS} more"] if len(findings) > LISTED_FINDINGS else []
    return "".join(f"\n  {line}" for line in [*findings[:LISTED_FINDINGS], *more])


def _digest(samples: Samples, data: DataYaml, cache: FileCache) -> str:
    """Return the SHA-256 of [names, channels, [[image's name, its SHA-256, its sorted boxes], ...]] as JSON."""

    def compute() -> str:
        digest = hashlib.sha256(f"{_json([list(data.names), data.channels])[:-1]},[".encode())
        separator = ""
        for i in sorted(range(len(samples)), key=samples.names.__getitem__):
            sample = samples[i]
            digest.update(f"{separator}{_json([sample.name, sample.sha256, sorted(sample.boxes)])}".encode())
            separator = ","
        digest.update(b"]]")
        return digest.hexdigest()

    content = hashlib.sha256(_json([list(data.names), data.channels, len(samples)]).encode())
    content.update(os.fsencode("\0".join(samples.names)))
    for part in (samples.sha256_N32, samples.starts, samples.boxes_B5):
        content.update(part.tobytes())
    return cache.digest(content.hexdigest(), compute)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _sha256(value: object) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()
