"""Choose epochs, batch, optimizer and other knobs from the number of images, for `auto` in a recipe and for `init`.

A fine-tuning needs a number of optimizer steps. A small data set has few steps in an epoch, so it needs more epochs. Epochs fall
with the fourth root of the number of images: 100 images get 100 epochs, and 1,600 images get 50. 100,000 images get the
minimum of 20 epochs, since the rule gives 18. Every result is a `Choice`: a number and the reason for it, which `init` writes beside
the number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .knob_types import IMGSZ_STEP
from .sections import SourceConfig, TrainConfig

if TYPE_CHECKING:
    from ..data.samples import Sample
    from .recipe import Recipe

REFERENCE_IMAGES = 100
EXPONENT = 0.25
# (epochs at 100 images, minimum). The proportions are those that were measured on BCCD: 40 for prune, 12 for distill and 3
# for QAT, after 30 for the baseline. Results on other data: benchmarks/RESULTS.md, "One's own data".
EPOCHS = {
    "teacher": (100, 20),
    "baseline": (100, 20),
    "sparsify": (15, 5),
    "prune": (70, 20),
    "distill": (25, 8),
    "qat": (6, 2),
}
SMALL_SET, LARGE_SET = 500, 20_000  # images: below 500 a batch has 8 images, from 20,000 it has 32
NOMINAL_BATCH, LONG_TRAINING = 64, 10_000  # Ultralytics' `optimizer=auto` changes above 10,000 steps of 64 images
# The gate asks for 98 % of the baseline's mAP50-95. With few validation images that would judge chance, so it asks for MLPerf's
# lower tier. Two equally good models differ by 1 % on 87 images (standard error on BCCD, benchmarks/RESULTS.md). The difference
# grows with the inverse root of the number of images.
MIN_RETENTION, MIN_RETENTION_FEW, FEW_VALIDATION_IMAGES = 0.98, 0.95, 50
STANDARD_ERROR, STANDARD_ERROR_IMAGES = 0.01, 87
SMALL_OBJECT_PX = 16  # two cells of the finest grid of YOLOv8, which has a cell every 8 px
LARGEST_PX = 1280
WHOLE_IMAGES, WHOLE_SHARE = 10, 5  # without mosaic: at most 10 epochs, and at most a fifth of all epochs


@dataclass(frozen=True)
class Choice:
    """A value that a rule chose for a knob, and the reason."""

    value: Any
    why: str


def epochs(stage: str, images: int) -> Choice:
    """Return the epochs of a stage that trains on this number of images."""
    reference, fewest = EPOCHS[stage]
    scaled = round(reference * (REFERENCE_IMAGES / max(images, REFERENCE_IMAGES)) ** EXPONENT)
    steps = math.ceil(images / batch(images).value)
    return Choice(max(scaled, fewest), f"{images:,} images are {steps:,} steps an epoch")


def batch(images: int) -> Choice:
    """Return the number of images in a training step."""
    if images < SMALL_SET:
        return Choice(8, f"fewer than {SMALL_SET} images: more steps an epoch")
    if images < LARGE_SET:
        return Choice(16, "Ultralytics' default")
    return Choice(32, f"{LARGE_SET:,} images or more: enough steps an epoch")


def close_mosaic(epochs: int) -> Choice:
    """Return the number of epochs without mosaic at the end of the training."""
    return Choice(min(WHOLE_IMAGES, epochs // WHOLE_SHARE), "ends on whole images, as in validation")


def optimizer(images: int, epochs: int) -> Choice:
    """Return the optimizer that Ultralytics chooses by the number of steps (8.4.190, `BaseTrainer.build_optimizer`)."""
    steps = math.ceil(images / NOMINAL_BATCH) * epochs
    if steps > LONG_TRAINING:
        return Choice("MuSGD", f"{steps:,} steps of {NOMINAL_BATCH} images, a long training")
    return Choice("AdamW", f"{steps:,} steps of {NOMINAL_BATCH} images, a short training")


def lr0(optimizer: str, classes: int) -> Choice:
    """Return the learning rate that Ultralytics chooses (8.4.190, `BaseTrainer.build_optimizer`)."""
    if optimizer in ("Adam", "AdamW"):
        return Choice(round(0.002 * 5 / (4 + classes), 6), f"0.002 * 5 / (4 + {classes} classes), as Ultralytics")
    return Choice(0.01, "as Ultralytics")


def imgsz(samples: Sequence[Sample], smallest_px: int) -> Choice:
    """Return the side of a square model input in px.

    It is large enough that nine objects in ten measure at least `SMALL_OBJECT_PX`. It is at most the size of the median image, and
    at most `LARGEST_PX`.

    Args:
        samples: Training images.
        smallest_px: Smallest side, unless the images themselves are smaller.
    """
    longest = statistics.median(max(sample.width, sample.height) for sample in samples)
    sides = sorted(
        math.sqrt(width * sample.width * height * sample.height) / max(sample.width, sample.height)
        for sample in samples
        for _, _, _, width, height in sample.boxes
    )
    small = sides[len(sides) // 10]  # as a fraction of the longer side of its image
    wanted = max(math.ceil(SMALL_OBJECT_PX / max(small, 1e-6) / IMGSZ_STEP) * IMGSZ_STEP, smallest_px)
    native = math.ceil(longest / IMGSZ_STEP) * IMGSZ_STEP
    side = max(min(wanted, native, LARGEST_PX), IMGSZ_STEP)
    why = f"one object in ten is smaller than {small * side:.0f} px at this size"
    if side == native < wanted:
        why += "; the images are not larger"
    elif side == LARGEST_PX < wanted:
        why += "; this is small for a detector, consider tiles"
    return Choice(side, why)


def min_retention(validation_images: int) -> Choice:
    """Return the smallest retention that the gate accepts, by the number of validation images."""
    chance = STANDARD_ERROR * math.sqrt(STANDARD_ERROR_IMAGES / validation_images)
    shown = f"on {validation_images:,} validation images equally good models differ by about {100 * chance:.1g} %"
    if validation_images < FEW_VALIDATION_IMAGES:
        return Choice(MIN_RETENTION_FEW, f"gate, fraction of the baseline's mAP50-95; {shown}: 0.98 would judge chance")
    return Choice(MIN_RETENTION, f"gate, fraction of the baseline's mAP50-95; {shown}")


def resolve(recipe: Recipe, images: int, classes: int) -> Recipe:
    """Return the recipe with a value in place of each `auto`, checked again as a whole.

    Args:
        recipe: Recipe from `recipe.load`.
        images: Number of training images.
        classes: Number of classes of the data set.

    Raises:
        RecipeError: The values cannot work together.
    """
    sections = {}
    for name in EPOCHS:
        section = getattr(recipe, name)
        if isinstance(section, TrainConfig) and not (isinstance(section, SourceConfig) and section.weights is not None):
            values = {knob: getattr(section, knob) for knob in type(section).model_fields}
            sections[name] = section.model_copy(update=_chosen_values(name, values, images, classes))
    return recipe.replaced(sections)


def said(asked: Recipe, resolved: Recipe) -> str | None:
    """Return one line of text with the value that replaced each `auto`. None: the recipe had no `auto`."""
    parts = []
    for name in EPOCHS:
        before, after = getattr(asked, name), getattr(resolved, name)
        if before is not None and before != after:
            knobs = (knob for knob in type(after).model_fields if getattr(before, knob) == "auto")
            parts.append(f"{name} " + " ".join(f"{knob}={getattr(after, knob)}" for knob in knobs))
    return "auto: " + "; ".join(parts) if parts else None


def _chosen_values(stage: str, values: dict[str, Any], images: int, classes: int) -> dict[str, Any]:
    """Return the values of the knobs of one section that may be `auto`. Later rules use the results of earlier ones."""
    rules: dict[str, Callable[[], Choice]] = {
        "epochs": lambda: epochs(stage, images),
        "batch": lambda: batch(images),
        "close_mosaic": lambda: close_mosaic(values["epochs"]),
        "optimizer": lambda: optimizer(images, values["epochs"]),
        "lr0": lambda: lr0(values["optimizer"], classes),
    }
    for knob, rule in rules.items():
        if values[knob] == "auto":
            values[knob] = rule().value
    return {knob: values[knob] for knob in rules}
