"""Image in, detections out: letterbox, engine, NMS; the one path for accuracy, pictures and the robot."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from ..backends.base import Backend
from .post import nms, to_image
from .pre import Canvas, Letterbox


class Detector:
    """A backend with its pre- and postprocessing. For one thread at a time: it holds the network's input.

    `prepare`, the backend and `found` are the three steps of `detect`; `pipeline.py` takes them in threads of their own.

    Args:
        backend: any, as `open_engine` gives it; stays the caller's to close.
        conf: scores must exceed this, from 0 to 1. This and the other defaults are those of a mAP run; 0.25 is usual in use.
        iou: a box is dropped if it overlaps a better one of its class by more than this, from 0 to 1.
        max_det: detections kept an image, best first.
        multi_label: a box may count for several classes (as in a mAP run), else its best only.
    """

    def __init__(
        self, backend: Backend, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
    ) -> None:
        self.backend, self.conf, self.iou, self.max_det, self.multi_label = backend, conf, iou, max_det, multi_label
        self._canvas = self.blank(1)

    def __call__(self, image_HW3: np.ndarray) -> np.ndarray:
        """Detections of one image.

        Args:
            image_HW3: uint8 RGB, of any size.

        Returns:
            detections_N6 float32, by falling score: x1, y1, x2, y2 in px of the image, score, class.

        Raises:
            NotFinite: the engine's output is not finite.
        """
        return self.detect([image_HW3])[0]

    def detect(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """Detections of several images, in as few calls of the engine as its batch allows.

        Args:
            images: each uint8 RGB [height, width, 3], of any size.

        Returns:
            detections_N6 of each, as of a call.

        Raises:
            NotFinite: the engine's output is not finite.
        """
        size = self.backend.batch or max(len(images), 1)
        if len(self._canvas.images_BCHW) < size:
            self._canvas = self.blank(size)
        found: List[np.ndarray] = []
        for start in range(0, len(images), size):
            input_BCHW, placed = self.prepare(images[start : start + size], self._canvas)
            found += self.found(self.backend(input_BCHW, copy=False), placed)
        return found

    def prepare(self, images: Sequence[np.ndarray], canvas: Canvas) -> Tuple[np.ndarray, List[Letterbox]]:
        """Letterbox the images of one call; gives the part of the canvas that the call takes, and where they are.

        Of a fixed batch, what has no image keeps what it held.
        """
        placed = [canvas.place(index, image) for index, image in enumerate(images)]
        return canvas.images_BCHW[: self.backend.batch or len(images)], placed

    def found(self, output_BCA: np.ndarray, placed: Sequence[Letterbox]) -> List[np.ndarray]:
        """NMS, and back to px of each image; reads the backend's settings only."""
        return [self._found(output_CA, where) for output_CA, where in zip(output_BCA, placed)]

    def _found(self, output_CA: np.ndarray, placed: Letterbox) -> np.ndarray:
        return to_image(nms(output_CA, self.conf, self.iou, self.max_det, self.multi_label), placed)

    def blank(self, count: int = 1) -> Canvas:
        """An input to prepare: of the engine's batch, or of `count` images where it takes any number."""
        return Canvas(
            np.zeros((self.backend.batch or count, self.backend.channels) + tuple(self.backend.imgsz), np.float32)
        )
