"""Image in, detections out: letterbox, engine, NMS; the one path for accuracy, pictures and the robot."""

from __future__ import annotations

from typing import List, Sequence

import numpy as np

from .backend import Backend
from .errors import NotFinite
from .post import nms, to_image
from .pre import Letterbox, letterbox


class Detector:
    """A backend with its pre- and postprocessing. For one thread at a time: it holds the network's input.

    Args:
        backend: any; stays the caller's to close.
        conf, iou, max_det, multi_label: see `post.nms`; the defaults are those of a mAP run.
    """

    def __init__(
        self, backend: Backend, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
    ) -> None:
        self.backend, self.conf, self.iou, self.max_det, self.multi_label = backend, conf, iou, max_det, multi_label
        self._input_BCHW = np.zeros((backend.batch or 1, 3) + tuple(backend.imgsz), np.float32)

    def __call__(self, image_HW3: np.ndarray) -> np.ndarray:
        """detections_N6 (xyxy in px of the image, score, class) of one uint8 RGB image."""
        return self.detect([image_HW3])[0]

    def detect(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """Detections of uint8 RGB images of any sizes, in as few calls of the engine as its batch allows.

        Raises:
            NotFinite: the engine's output is not finite.
        """
        size = self.backend.batch or max(len(images), 1)
        found: List[np.ndarray] = []
        for start in range(0, len(images), size):
            found += self._detect(images[start : start + size])
        return found

    def _detect(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """One call of the engine. Of a fixed batch, the rest keeps what it held."""
        count = self.backend.batch or len(images)
        if len(self._input_BCHW) < count:
            self._input_BCHW = np.zeros((count,) + self._input_BCHW.shape[1:], np.float32)
        placed = [letterbox(image, self.backend.imgsz, out=chw)[1] for image, chw in zip(images, self._input_BCHW)]
        output_BCA = self.backend(self._input_BCHW[:count])
        return [self._found(output_CA, where) for output_CA, where in zip(output_BCA, placed)]

    def _found(self, output_CA: np.ndarray, placed: Letterbox) -> np.ndarray:
        if not np.isfinite(output_CA).all():
            raise NotFinite("the network's output holds NaN or infinity")
        return to_image(nms(output_CA, self.conf, self.iou, self.max_det, self.multi_label), placed)
