"""Run both models of a cascade on images, and keep their detections and the router's features. Measure latencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from yolo_compress.errors import DataError, NumericsError
from yolo_compress.evaluate.accuracy import ImageTruth
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.runtime.backends.base import Backend
from yolo_compress.runtime.detect.cascade import features
from yolo_compress.runtime.detect.detector import Detector, routed
from yolo_compress.runtime.detect.pre import UnreadableImage, read_image
from yolo_compress.runtime.errors import NotFinite
from yolo_compress.runtime.measure import end_to_end
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.messages import Measured, Spec

AHEAD = 4  # images that are decoded while the models run


@dataclass(frozen=True)
class Collected:
    """Detections of both models in images, and the router's features.

    Attributes:
        truths: ground-truth boxes, one (N, 5) array per image, columns class, x1, y1, x2, y2 in px.
        found: detections of each model as for a measurement of mAP: one (N, 6) array per image.
        features_IF: features of each image, from the first model's detections.
    """

    truths: list[np.ndarray]
    found: list[list[np.ndarray]]
    features_IF: np.ndarray


def collect(
    models: Sequence[Backend], samples: Sequence[ImageTruth], progress: Callable[[int], Any] | None = None
) -> Collected:
    """Run every model on every image.

    Args:
        models: opened engines. The first is the small model.
        samples: images with ground truth.
        progress: called with 1 after each image.

    Raises:
        DataError: an image cannot be read.
        NumericsError: the output of a model holds NaN or infinity.
    """
    detectors = [Detector(model) for model in models]
    canvases = [detector.blank() for detector in detectors]
    found: list[list[np.ndarray]] = [[] for _ in models]
    rows = []
    with ThreadPoolExecutor(1) as pool:
        left = iter(samples)
        waiting = [pool.submit(read_image, sample.image) for sample in islice(left, AHEAD)]
        for sample in samples:
            try:
                image_HW3 = waiting.pop(0).result()
            except UnreadableImage as error:
                raise DataError(str(error)) from error
            waiting += [pool.submit(read_image, one.image) for one in islice(left, 1)]
            try:
                for number, (detector, canvas) in enumerate(zip(detectors, canvases, strict=True)):
                    input_BCHW, placed = detector.prepare([image_HW3], canvas)
                    output_BCA = detector.backend(input_BCHW, copy=False)
                    found[number] += detector.found(output_BCA, placed)
                    if number == 0:
                        rows.append(features(routed(output_BCA[0], placed[0]), *image_HW3.shape[:2]))
            except NotFinite as error:
                raise NumericsError(f"{sample.image}: {error}") from error
            if progress is not None:
                progress(1)
    return Collected([absolute_boxes(sample) for sample in samples], found, np.array(rows))


def times(
    folders: Sequence[Path],
    labels: Sequence[str],
    images: Sequence[Path],
    rounds: int,
    least: int,
    progress: Callable[[int], Any] | None = None,
) -> list[Measured]:
    """Measure the latency of engines and cascades from a decoded image to its detections, each in a process of its own, in turn.

    Args:
        folders: engine folders and policy folders.
        labels: names of them, for errors.
        images: image files. Every round uses each of them equally often.
        rounds: number of rounds; an even number cancels drift.
        least: least number of samples of each in a round.
        progress: called with 1 after each round of each.

    Raises:
        LatencyError: a measuring process failed.
    """
    specs: list[Spec] = [
        {"label": label, "engine": str(folder), "module": end_to_end.MODULE, "images": [str(image) for image in images]}
        for folder, label in zip(folders, labels, strict=True)
    ]
    return measure_in_turn(specs, rounds, -(-least // len(images)) * len(images), progress)
