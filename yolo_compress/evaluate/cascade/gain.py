"""The AP of any mix of two models' detections, and what each image adds to it.

A mix takes the large model's detections in some images, and the small model's in the others. AP belongs to a set of images, not to an
image. So the gain of an image is a difference of two sets: how much the mAP of all images changes if this image alone goes to the
large model. The idea is that of the reward in arXiv 2410.18919; here it is the mean over two sets of neighbours, see `gains`.

Shape suffixes: I images, R mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yolo_compress.evaluate.bootstrap import over_classes, replicate
from yolo_compress.runtime.max_detections import MAX_DETECTIONS
from yolo_compress.runtime.measure.coco_map import Matches, match


@dataclass(frozen=True)
class Mixes:
    """Matches of both models' detections. Image i of the small model is image i, and of the large model image `images` + i."""

    matches: Matches
    images: int

    @classmethod
    def of(
        cls,
        truths: Sequence[np.ndarray],
        small: Sequence[np.ndarray],
        large: Sequence[np.ndarray],
        classes: int,
        most: int = MAX_DETECTIONS,
    ) -> Mixes:
        """Match the detections of both models.

        Args:
            truths: ground-truth boxes, one (N, 5) array per image, columns class, x1, y1, x2, y2 in px.
            small, large: detections of each model, one (N, 6) array per image, columns x1, y1, x2, y2 in px, score, class.
            classes: number of classes.
            most: largest number of detections per class and image that count.
        """
        return cls(match([*truths, *truths], [*small, *large], classes, ("all",), most), len(truths))

    def map50_95(self, large_RI: np.ndarray, weights_RI: np.ndarray | None = None) -> np.ndarray:
        """Return the mAP50-95 of each mix, (R,) float64; NaN without a ground-truth box.

        Args:
            large_RI: whether an image goes to the large model.
            weights_RI: how often an image counts, as `bootstrap.resamples` returns it. None: once.
        """
        large_RI = np.asarray(large_RI, bool)
        count_RI = np.ones(large_RI.shape, np.uint16) if weights_RI is None else weights_RI
        weights_R2I = np.concatenate([count_RI * ~large_RI, count_RI * large_RI], axis=1)
        return over_classes(replicate([self.matches], weights_R2I)[0].ap50_95_RAK[:, 0])


def gains(mixes: Mixes) -> np.ndarray:
    """Return the mAP50-95 that each image gains from the large model, (I,) float64.

    It is the mean of two changes: this image alone goes to the large model while all others stay, and it alone stays while all
    others go. The first says what a few images add, the last what nearly all of them leave.
    """
    images = mixes.images
    one_II = np.eye(images, dtype=bool)
    none_1I = np.zeros((1, images), bool)
    first_I = mixes.map50_95(one_II) - mixes.map50_95(none_1I)
    last_I = mixes.map50_95(~none_1I) - mixes.map50_95(~one_II)
    return (first_I + last_I) / 2
