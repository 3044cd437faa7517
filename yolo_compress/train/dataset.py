"""Load training images with Ultralytics' augmentations, from a data set that passed the preflight.

The label and image caches of Ultralytics are not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from copy import copy
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Sampler, get_worker_info
from ultralytics.data.dataset import YOLODataset

from yolo_compress.data.dataset import Sample
from yolo_compress.nets.hardening import let_warnings_through
from yolo_compress.progress import bar
from yolo_compress.runtime.measure.device import usable_cpus

let_warnings_through()

SHOWN_FROM = 1000  # with fewer images, there is no progress bar
# Images, sizes before and sizes after resizing, (height, width) px, of the data set that was decoded last.
_Decoded = tuple[list[Any], list[Any], list[Any]]
_decoded: dict[str, _Decoded] = {}
RAM_CACHE_BYTES = 1 << 30  # decoded training images up to this size stay in memory; COCO does not fit, BCCD needs 50 MB


class PreflightDataset(YOLODataset):
    """An Ultralytics `YOLODataset` with the images and labels of `data.dataset.load`. Training and evaluation then use the same boxes.

    Ultralytics' own scan is not used, for three reasons. It drops bad images with only a warning. It writes `labels.cache`
    next to the data, which concurrent runs share and the next run unpickles. It reads `.npy` files, which are not hashed.
    """

    def __init__(self, samples: Sequence[Sample], *, cache: bool, hyp: Any, **kwargs: Any) -> None:
        self._samples = samples
        self._epoch = -1  # the epoch that this worker loads
        super().__init__(img_path="", task="detect", hyp=hyp, **kwargs)
        self.npy_files = [Path(f"{file}.never") for file in self.im_files]
        longest = self.imgsz if isinstance(self.imgsz, int) else max(self.imgsz)
        decoded = sum(3 * longest * longest * min(s.width, s.height) / max(s.width, s.height) for s in samples)
        if cache and decoded <= RAM_CACHE_BYTES:
            self.cache = "ram"
            self.ims, self.im_hw0, self.im_hw = self._all_images()
            self.transforms = self.build_transforms(
                hyp=copy(hyp)
            )  # with a cache, mosaics draw from all images instead of a buffer

    def _all_images(self) -> _Decoded:
        """Return all images decoded, with their sizes before and after resizing. The next stage of a command uses them again."""
        content = hashlib.sha256(json.dumps([self.imgsz, self.channels, *(s.sha256 for s in self._samples)]).encode())
        if content.hexdigest() not in _decoded:
            _decoded.clear()
            images: _Decoded = [], [], []
            shown = bar("decode images", self.ni, "image", least=SHOWN_FROM)
            with shown as advance, ThreadPool(usable_cpus()) as pool:
                for image in pool.imap(super().load_image, range(self.ni), chunksize=16):
                    for part, value in zip(images, image, strict=True):
                        part.append(value)
                    advance()
            _decoded[content.hexdigest()] = images
        return _decoded[content.hexdigest()]

    def get_img_files(self, img_path: str) -> list[str]:
        return [str(sample.image) for sample in self._samples]

    def get_labels(self) -> list[Label]:
        return [_label(sample) for sample in self._samples]

    def load_image(self, i: int, **kwargs: Any) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Return a copy of a cached image, because Ultralytics' HSV augmentation changes it in place."""
        image, original_hw, resized_hw = super().load_image(i, **kwargs)
        return (image.copy() if self.cache == "ram" and self.augment else image), original_hw, resized_hw

    def __getitem__(self, index: int) -> dict[str, object]:
        """Return an image with its labels, augmented.

        In a data worker, seed the random generators for this image first. The augmentation then does not depend on which worker
        loads the image, or on whether the run was resumed.
        """
        if isinstance(index, SeededIndex) and get_worker_info() is not None:
            if index.epoch != self._epoch:
                self._epoch = index.epoch
                self.start_epoch()
            seed_everything(*index.seeds)
        return super().__getitem__(index)  # type: ignore[no-any-return]

    def start_epoch(self) -> None:
        """Clear the mosaic buffer of the last epoch, so that an epoch depends only on its seed."""
        if self.cache == "ram":
            return
        for i in self.buffer:
            self.ims[i], self.im_hw0[i], self.im_hw[i] = None, None, None
        self.buffer.clear()


class SeededIndex(int):
    """Index of an image, with the seeds for its augmentation: run seed, epoch, rank and position in the epoch."""

    epoch: int
    seeds: tuple[int, ...]

    def __new__(cls, index: int, seeds: Sequence[int] = (0, 0)) -> SeededIndex:
        made = super().__new__(cls, index)
        made.seeds, made.epoch = tuple(seeds), seeds[1]
        return made


class EpochSampler(Sampler[int]):
    """Sampler whose order of images depends only on (seed, epoch). Each rank takes every `world`-th index.

    Each call of `iter` is one epoch. The sampler counts the epochs itself, because a loader that prefetches starts the next epoch
    before the trainer does.
    """

    def __init__(self, count: int, seed: int, *, rank: int = 0, world: int = 1) -> None:
        self.count, self.seed, self.rank, self.world = count, seed, rank, world
        self.next_epoch = 0

    def __iter__(self) -> Iterator[int]:
        epoch = self.next_epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        self.next_epoch += 1
        padded = np.resize(order, len(self) * self.world)
        own = padded[self.rank :: self.world].tolist()
        seeds = (self.seed, epoch, self.rank)
        return iter([SeededIndex(index, (*seeds, place)) for place, index in enumerate(own)])

    def __len__(self) -> int:
        return -(-self.count // self.world)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing. Ultralytics calls this under DDP, but `__iter__` counts the epochs."""


class Label(TypedDict):
    """An image and its boxes, in the format of Ultralytics' dataset."""

    im_file: str
    shape: tuple[int, int]  # (height, width), px
    cls: np.ndarray  # classes_N1
    bboxes: np.ndarray  # boxes_N4, `bbox_format`, 0 to 1
    segments: list[np.ndarray]
    keypoints: np.ndarray | None
    normalized: bool
    bbox_format: str


def _label(sample: Sample) -> Label:
    boxes = np.asarray(sample.boxes, dtype=np.float32).reshape(-1, 5)
    return {
        "im_file": str(sample.image),
        "shape": (sample.height, sample.width),
        "cls": boxes[:, :1],
        "bboxes": boxes[:, 1:],
        "segments": [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }


def seed_everything(seed: int, epoch: int, *more: int) -> None:
    """Seed the generators of Python, numpy and torch from (seed, epoch) and further numbers such as the rank."""
    import random

    value = int(np.random.SeedSequence([seed, epoch, *more]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
