"""Accuracy of a backend: letterbox, score threshold 0.001, NMS at IoU 0.7 if its boxes need NMS, mAP by pycocotools."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from yolo_compress.errors import DataError, NumericsError, RecipeError
from yolo_compress.evaluate.coco import Truth, mean_ap
from yolo_compress.runtime.backends.base import Backend
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import Canvas, Letterbox, UnreadableImage, read_image
from yolo_compress.runtime.errors import NotFinite
from yolo_compress.runtime.max_detections import MAX_DET, counted
from yolo_compress.runtime.measure.coco_map import MeanAP
from yolo_compress.runtime.measure.device import usable_cpus

DYNAMIC_BATCH = 4  # images per call if the backend takes any number


class ImageTruth(Truth, Protocol):
    """Ground truth of an image, with the path of its file; `data.samples.Sample` implements it."""

    @property
    def image(self) -> Path: ...


class Accuracy(MeanAP):
    """The AP of a backend, the detections behind it, and the digest of the images."""

    images: int
    image_set: str | None  # digest of the samples
    executed: str  # the arithmetic that the runtime chose, as text
    detections: list[np.ndarray]  # one N6 array per image, boxes in px of the source image


def accuracy(
    backend: Backend,
    samples: Sequence[ImageTruth],
    names: Sequence[str],
    imgsz: tuple[int, int],
    progress: Callable[[int], Any] | None = None,
    *,
    image_set: str | None = None,
    max_det: int = MAX_DET,
) -> Accuracy:
    """Run a backend on images with ground truth, and return the AP and the detections.

    Threads read and letterbox the next images while the backend runs.

    Args:
        backend: an opened backend. It is not closed.
        samples: images with ground truth.
        names: class names of the data set. They must equal the backend's class names.
        imgsz: height and width, px. They must equal the backend's `imgsz`.
        progress: called after each batch with the number of images in the batch.
        image_set: digest of the samples. It is copied into the result.
        max_det: largest number of detections per image after NMS. `runtime.max_detections.counted` says how many of them mAP counts.

    Raises:
        RecipeError: backend and data set differ in classes or image size.
        DataError: an image cannot be read, or the size of an image differs from the size in its sample.
        NumericsError: the output holds NaN or infinity.
    """
    if tuple(backend.names) != tuple(names):
        raise RecipeError(f"the model's classes are {list(backend.names)}, the data set's {list(names)}")
    if tuple(backend.imgsz) != tuple(imgsz):
        raise RecipeError(f"the model takes {list(backend.imgsz)} px, imgsz is {list(imgsz)}")
    detector, detections = Detector(backend, max_det=max_det), list[np.ndarray]()
    with closing(_prepared(detector, samples, usable_cpus())) as batches:
        for input_BCHW, placed in batches:
            try:
                detections += detector.found(backend(input_BCHW, copy=False), placed)
            except NotFinite as e:
                raise NumericsError(f"{samples[len(detections)].image}: {e} (image or one of its batch)") from e
            if progress is not None:
                progress(len(placed))
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


Batch = tuple[np.ndarray, list[Letterbox]]


def _prepared(detector: Detector, samples: Sequence[ImageTruth], workers: int) -> Generator[Batch, None, None]:
    """Yield the inputs of the backend, and the placement of their images, in order. `workers` threads prepare inputs ahead.

    An input is overwritten after the next one is taken.
    """
    size = detector.backend.batch or DYNAMIC_BATCH
    free = [detector.blank(size) for _ in range(2 * workers)]
    waiting = deque[tuple[Future[Batch], Canvas]]()

    def prepare(batch: Sequence[ImageTruth], canvas: Canvas) -> Batch:
        return detector.prepare([_load(sample) for sample in batch], canvas)

    pool = ThreadPoolExecutor(workers)
    try:
        for start in range(0, len(samples), size):
            if not free:
                future, canvas = waiting.popleft()
                yield future.result()
                free.append(canvas)
            canvas = free.pop()
            waiting.append((pool.submit(prepare, samples[start : start + size], canvas), canvas))
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
