"""`Detector` turns an image into detections: letterbox, engine and NMS. Evaluation, drawing and the robot all use this code."""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np

from ..backends.base import Backend
from .cascade import ROUTE_CONF, ROUTE_IOU, ROUTE_MAX_DET, CascadeEngine, Policy
from .post import EVERY_BOX, nms, to_image
from .pre import Canvas, Letterbox


class Detector:
    """An opened engine, with letterbox before it and NMS after it. The default thresholds suit a measurement of mAP.

    Use a detector from one thread at a time, because the detector reuses one array for the model's input. `detect` has three
    steps: `prepare`, the engine, and `found`. `stream.Pipeline` runs the three steps in several threads.

    For a cascade, the three steps are those of the small model, and `large` is the detector of the large model. `completed` then
    replaces the detections of the images that need the large model. Which images these are does not depend on the arguments.

    Args:
        backend: an opened engine or cascade, as from `open_engine`. The caller closes it.
        conf: score threshold, 0 to 1. Every detection has a higher score. Deployments often use 0.25.
        iou: IoU threshold of NMS, 0 to 1. A box is removed if its IoU with a better box of its class is above this threshold.
            Ignored if the engine's boxes do not need NMS (`Backend.needs_nms`).
        max_det: largest number of detections per image. The best are returned.
        multi_label: True: a box may give detections of several classes, as for a measurement of mAP. False: only its best class.
    """

    def __init__(
        self, backend: Backend, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
    ) -> None:
        self.conf, self.max_det, self.multi_label = conf, max_det, multi_label
        self.large: Optional[Detector] = None
        self._policy: Optional[Policy] = None
        if isinstance(backend, CascadeEngine):
            self.large = Detector(backend.large, conf, iou, max_det, multi_label)
            self._policy, backend = backend.policy, backend.small
        self.backend: Backend = backend
        self.iou = iou if self.backend.needs_nms else EVERY_BOX
        self._canvas = self.blank(1)

    def __call__(self, image_HW3: np.ndarray) -> np.ndarray:
        """Detect objects in one image.

        Args:
            image_HW3: (H, W, 3) uint8 RGB array, of any size.

        Returns:
            (N, 6) float32 array, columns x1, y1, x2, y2 in px of the image, score, class. The highest score comes first.

        Raises:
            NotFinite: the engine's output is not finite.
        """
        return self.detect([image_HW3])[0]

    def detect(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """Detect objects in several images, with as few calls of the engine as its batch size allows.

        Args:
            images: (H, W, 3) uint8 RGB arrays, each of any size.

        Returns:
            The detections of each image, as `__call__` returns them.

        Raises:
            NotFinite: the engine's output is not finite.
        """
        size = self.backend.batch or max(len(images), 1)
        if len(self._canvas.images_BCHW) < size:
            self._canvas = self.blank(size)
        found: List[np.ndarray] = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            input_BCHW, placed = self.prepare(batch, self._canvas)
            output_BCA = self.backend(input_BCHW, copy=False)
            if self.large is None:
                found += self.found(output_BCA, placed)
            else:
                found += self.completed(batch, output_BCA, placed, self.large.detect)
        return found

    def prepare(self, images: Sequence[np.ndarray], canvas: Canvas) -> Tuple[np.ndarray, List[Letterbox]]:
        """Letterbox the images of one inference into `canvas`.

        If the engine has a fixed batch and there are fewer images, the rest of the batch keeps its old content.

        Returns:
            The input array for the engine, and the placement of each image in the model's input.
        """
        placed = [canvas.place(index, image) for index, image in enumerate(images)]
        return canvas.images_BCHW[: self.backend.batch or len(images)], placed

    def found(self, output_BCA: np.ndarray, placed: Sequence[Letterbox]) -> List[np.ndarray]:
        """Return the detections of each image from the engine's output: NMS, then boxes in px of the image. Thread-safe."""
        return [self._found(output_CA, where) for output_CA, where in zip(output_BCA, placed)]

    def completed(
        self,
        images: Sequence[np.ndarray],
        output_BCA: np.ndarray,
        placed: Sequence[Letterbox],
        detect_large: Callable[[Sequence[np.ndarray]], List[np.ndarray]],
    ) -> List[np.ndarray]:
        """Return the detections of each image from a cascade: the small model's, or the large model's where the router says so.

        Args:
            images: the images of one inference of the small model.
            output_BCA: the small engine's output for them.
            placed: their placement in the small model's input.
            detect_large: function that returns the large model's detections in images.
        """
        assert self._policy is not None, "the detector is not of a cascade"
        found, handed = [], []
        for index, (output_CA, where) in enumerate(zip(output_BCA, placed)):
            rows_N6, routed_N6 = self._both(output_CA, where)
            if self._policy.hands_over(routed_N6, where.height, where.width):
                handed.append(index)
            found.append(rows_N6)
        if handed:
            for index, rows_N6 in zip(handed, detect_large([images[index] for index in handed])):
                found[index] = rows_N6
        return found

    def margin(self, image_HW3: np.ndarray) -> float:
        """Return the router's margin for an image, see `Policy.margin`. Above 0, the cascade gives the large model's detections.

        Only the small model runs.
        """
        assert self._policy is not None, "the detector is not of a cascade"
        input_BCHW, placed = self.prepare([image_HW3], self._canvas)
        output_BCA = self.backend(input_BCHW, copy=False)
        return self._policy.margin(routed(output_BCA[0], placed[0]), *image_HW3.shape[:2])

    def _both(self, output_CA: np.ndarray, placed: Letterbox) -> Tuple[np.ndarray, np.ndarray]:
        """Return the small model's detections, and those that the router sees.

        If the settings differ only in `conf`, one NMS serves both: a box is never removed by one of a lower score.
        """
        if self.multi_label or (self.iou, self.max_det) != (ROUTE_IOU, ROUTE_MAX_DET):
            return self._found(output_CA, placed), routed(output_CA, placed)
        all_N6 = to_image(nms(output_CA, min(self.conf, ROUTE_CONF), self.iou, self.max_det, False), placed)
        return all_N6[all_N6[:, 4] > self.conf], all_N6[all_N6[:, 4] > ROUTE_CONF]

    def _found(self, output_CA: np.ndarray, placed: Letterbox) -> np.ndarray:
        return to_image(nms(output_CA, self.conf, self.iou, self.max_det, self.multi_label), placed)

    def blank(self, count: int = 1) -> Canvas:
        """Return a new canvas for `prepare`, with the engine's batch size, or `count` images if the engine takes any number."""
        return Canvas(
            np.zeros((self.backend.batch or count, self.backend.channels) + tuple(self.backend.imgsz), np.float32)
        )


def routed(output_CA: np.ndarray, placed: Letterbox) -> np.ndarray:
    """Return the small model's detections by the router's settings, which are the same in every program. See `Policy.hands_over`."""
    return to_image(nms(output_CA, ROUTE_CONF, ROUTE_IOU, ROUTE_MAX_DET, False), placed)
