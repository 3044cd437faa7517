"""Measure the latency from a decoded image to its detections: letterbox, engine and NMS, for an engine or a cascade.

As a measuring process for `measure_in_turn`: the `Spec` has this module as `module`, and the image files as `images`. The images are
decoded before the first round. Sample i of a round is of image i modulo the number of images. A cascade has both engines in one
process, and only some of its images also go through the large model; so a round should have a multiple of that number.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, Callable, List

from ..backends.base import Backend
from ..detect.detector import Detector
from ..detect.pre import read_image
from .latency import main
from .messages import Spec

MODULE = __name__
CONF = 0.25  # a deployment's; the time of NMS depends on it


def detections(backend: Backend, spec: Spec) -> List[Callable[[], Any]]:
    """Return a function for each image of the spec, which detects objects in it.

    Raises:
        UnreadableImage: an image cannot be read.
    """
    detector = Detector(backend, CONF, multi_label=False)
    return [partial(detector, read_image(file)) for file in spec["images"]]


if __name__ == "__main__":
    sys.exit(main(calls=detections))
