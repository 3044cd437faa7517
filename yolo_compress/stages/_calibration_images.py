"""Training images without augmentation, for calibration and for re-estimating BatchNorm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from yolo_compress import progress
from yolo_compress.data.data_yaml import shown
from yolo_compress.data.dataset import Dataset, Sample, calibration_subset
from yolo_compress.errors import DataError
from yolo_compress.files.atomic import atomic_write
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.runtime.detect.pre import letterbox, read_image
from yolo_compress.stages import Job
from yolo_compress.stages.file_types import CalibrationImage
from yolo_compress.store.fingerprint import fingerprint

BATCH = 16


def calibration_samples(job: Job, count: int) -> list[Sample]:
    """Return `count` training images, chosen by the recipe's seed. If there are fewer, return all and print a line."""
    samples = calibration_subset(job.dataset.train, count, job.recipe.run.seed)
    if len(samples) < count:
        progress.say(f"calibration: all {len(samples)} training images, fewer than the {count} of calib_images")
    return samples


def check_calibration(recipe: Recipe, dataset: Dataset, section: str) -> None:
    """Check, before any stage runs, that the calibration images of a section are usable.

    Images are read only until one has more than one colour.

    Raises:
        DataError: All images are of one colour, or `sensitivity` is mAP and no image has an object.
    """
    config = getattr(recipe, section)
    samples = calibration_subset(dataset.train, config.calib_images, recipe.run.seed)
    if all(_one_colour(read_image(sample.image)) for sample in samples):
        raise _blank(samples, f"{section}.calib_images")
    if getattr(config, "sensitivity", "off") == "map50_95" and not any(sample.boxes for sample in samples):
        raise DataError(
            f"{section}.sensitivity=map50_95: all {len(samples)} calibration images are background, so mAP is undefined; set "
            f"{section}.sensitivity=loss, or a higher {section}.calib_images"
        )


def _one_colour(image_HW3: np.ndarray) -> bool:
    return bool((image_HW3 == image_HW3[0, 0]).all())


def _blank(samples: Sequence[Sample], knob: str) -> DataError:
    return DataError(
        f"calibration: all {len(samples)} images are of one colour, such as {shown(samples[0].image)}; give images with "
        f"objects in the training split, or a higher {knob}"
    )


def letterboxed(
    samples: Sequence[Sample], imgsz_hw: tuple[int, int], channels: int = 3, batch: int = BATCH
) -> Iterator[Tensor]:
    """Yield batches of images, letterboxed as for validation: (B, C, H, W) float32 tensors in 0..1, RGB or grey.

    Raises:
        DataError: Each image has only one colour. Scales from such images would clip the values of other images.
    """
    # A batch of one image has no variance at 32 px, so a single last image joins the batch before it.
    rest = len(samples) % batch == 1 and len(samples) > 1
    blank = bool(samples)
    ends = [*range(batch, len(samples) - rest, batch), len(samples)]
    for start, end in zip([0, *ends], ends, strict=False):
        part = samples[start:end]
        pixels = [read_image(sample.image) for sample in part]
        blank = blank and all(map(_one_colour, pixels))
        images = [letterbox(image, imgsz_hw, channels=channels)[0] for image in pixels]
        yield torch.from_numpy(np.stack(images))
    if blank:
        raise _blank(samples, "calib_images")


def write_list(job: Job, samples: Sequence[Sample]) -> str:
    """Write the names and SHA-256 of the calibration images to `calibration.json`. Return one hash of the whole list."""
    rows: list[CalibrationImage] = [{"name": sample.name, "sha256": sample.sha256} for sample in samples]
    atomic_write(job.out / "calibration.json", json.dumps(rows, indent=1) + "\n")
    return fingerprint({"images": [row["sha256"] for row in rows]})
