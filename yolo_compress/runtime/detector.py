"""Image in, detections out: letterbox, engine, NMS; the one path for accuracy, pictures and the robot."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from .backend import Backend
from .errors import NotFinite
from .post import nms, to_image
from .pre import Letterbox, letterbox


class Detector:
    """A backend with its pre- and postprocessing.

    Args:
        backend: any; stays the caller's to close.
        conf, iou, max_det, multi_label: see `post.nms`; the defaults are those of a mAP run.
    """

    def __init__(
        self, backend: Backend, conf: float = 0.001, iou: float = 0.7, max_det: int = 300, multi_label: bool = True
    ) -> None:
        self.backend, self.conf, self.iou, self.max_det, self.multi_label = backend, conf, iou, max_det, multi_label

    def __call__(self, image_HW3: np.ndarray) -> np.ndarray:
        """detections_N6 (xyxy in px of the image, score, class) of one uint8 RGB image."""
        return self.detect([letterbox(image_HW3, self.backend.imgsz)])[0]

    def detect(self, inputs: Sequence[Tuple[np.ndarray, Letterbox]]) -> List[np.ndarray]:
        """Detections of images that are letterboxed already; runs full batches, the last one padded.

        Raises:
            NotFinite: the engine's output is not finite.
        """
        found: List[np.ndarray] = []
        fixed = self.backend.batch
        size = fixed or max(len(inputs), 1)
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            images = [chw for chw, _ in part]
            if fixed is not None:
                images += [images[-1]] * (fixed - len(images))
            output_BCA = self.backend(np.stack(images))
            for index, (_, placed) in enumerate(part):
                if not np.isfinite(output_BCA[index]).all():
                    raise NotFinite("the network's output holds NaN or infinity")
                kept_N6 = nms(output_BCA[index], self.conf, self.iou, self.max_det, self.multi_label)
                found.append(to_image(kept_N6, placed))
        return found
