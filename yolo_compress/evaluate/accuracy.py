"""Accuracy of any backend: square (or the given) letterbox, confidence 0.001, NMS at IoU 0.7, mAP by pycocotools."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from yolo_compress.errors import DataError, NumericsError, RecipeError
from yolo_compress.evaluate.coco import Truth, mean_ap
from yolo_compress.runtime.backends.base import Backend
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import UnreadableImage, read_image
from yolo_compress.runtime.errors import NotFinite
from yolo_compress.runtime.limits import MAX_DET, counted
from yolo_compress.runtime.measure.coco_map import MeanAP

DYNAMIC_BATCH = 4  # images a call where the backend takes any number


class ImageTruth(Truth, Protocol):
    """Ground truth with the image's file; `data.Sample` is one."""

    @property
    def image(self) -> Path: ...


class Accuracy(MeanAP):
    """The AP of a backend, and what it was taken from."""

    images: int
    image_set: str | None  # digest of the samples, as given
    executed: str  # the arithmetic that the runtime chose, in words
    detections: list[np.ndarray]  # N6 an image, px of the original image


def accuracy(
    backend: Backend,
    samples: Sequence[ImageTruth],
    names: Sequence[str],
    imgsz: tuple[int, int],
    progress: Callable[[int], Any] | None = None,
    *,
    image_set: str | None = None,
    workers: int = 0,
    max_det: int = MAX_DET,
) -> Accuracy:
    """Run the backend over the images and evaluate its detections.

    Args:
        backend: opened; stays open.
        samples: images with ground truth.
        names: classes of the data set; the backend's must be the same.
        imgsz: height and width, px; the backend's must be the same.
        progress: called with the number of images just finished.
        image_set: digest of the samples, put into the result.
        max_det: detections of an image that NMS keeps; see `runtime.limits.counted` for what mAP counts of them.
        workers: threads that read images ahead; 0 reads in turn.

    Raises:
        RecipeError: backend and data set differ in classes or size.
        DataError: an image that cannot be read or has another size than its sample says.
        NumericsError: NaN or infinity in the output.
    """
    if tuple(backend.names) != tuple(names):
        raise RecipeError(f"the model's classes are {list(backend.names)}, the data set's {list(names)}")
    if tuple(backend.imgsz) != tuple(imgsz):
        raise RecipeError(f"the model takes {list(backend.imgsz)} px, imgsz is {list(imgsz)}")
    detector, detections = Detector(backend, max_det=max_det), list[np.ndarray]()
    images = _read_ahead(samples, workers)
    while batch := list(islice(images, backend.batch or DYNAMIC_BATCH)):
        try:
            detections += detector.detect(batch)
        except NotFinite as e:
            raise NumericsError(f"{samples[len(detections)].image}: {e} (image or one of its batch)") from e
        if progress is not None:
            progress(len(batch))
    return {
        **mean_ap(samples, detections, names, counted(max_det)),
        "images": len(samples),
        "image_set": image_set,
        "executed": backend.executed,
        "detections": detections,
    }


def _load(sample: ImageTruth) -> np.ndarray:
    try:
        image_HW3 = read_image(sample.image)
    except UnreadableImage as e:
        raise DataError(str(e)) from e
    if image_HW3.shape[:2] != (sample.height, sample.width):
        raise DataError(
            f"{sample.image}: {image_HW3.shape[1]}x{image_HW3.shape[0]} px, {sample.width}x{sample.height} at preflight"
        )
    return image_HW3


def _read_ahead(samples: Iterable[ImageTruth], workers: int) -> Iterator[np.ndarray]:
    """Images in order; with workers, a bounded number is held."""
    if workers < 1:
        yield from map(_load, samples)
        return
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for sample in samples:
            waiting.append(pool.submit(_load, sample))
            if len(waiting) >= 2 * workers + DYNAMIC_BATCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
