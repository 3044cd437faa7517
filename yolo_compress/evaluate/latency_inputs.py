"""Write the images on which latencies are measured: `bench` and `ab` time engines on the same kind of input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolo_compress.data.samples import Sample
from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime.detect.pre import letterbox, read_image

IMAGES = 8  # number of real images that the timed calls use in turn


def write_inputs(file: Path, samples: Sequence[Sample], imgsz_hw: tuple[int, int], batch: int = 1) -> None:
    """Write letterboxed images to a .npy file, for `inputs` of `messages.Spec`.

    If there are too few samples, samples are repeated.

    Args:
        file: File to write.
        samples: Validation images. The first ones are used.
        imgsz_hw: Height and width of the input, px.
        batch: The number of images is a multiple of this batch.

    Raises:
        StorageError: The file cannot be written.
    """
    count = -(-IMAGES // batch) * batch
    images = [letterbox(read_image(sample.image), imgsz_hw)[0] for sample in samples[:count]]
    with storage_errors(file):
        np.save(file, np.stack([images[index % len(images)] for index in range(count)]))
