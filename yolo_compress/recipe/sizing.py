"""How long a training is, by the number of training images: what `auto` in a recipe stands for, and what `init` writes.

Small sets need many passes, since fine-tuning is a matter of optimizer steps; large ones need few, since each pass has many.
Passes fall with the fourth root of the number of images: 100 images 100 epochs, 1,600 images 50, 100,000 images 20 (18, raised).
Every result is a `Choice`, whose reason `init` writes beside the number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .knobs import IMGSZ_STEP
from .sections import SourceConfig, TrainConfig

if TYPE_CHECKING:
    from ..data.reader import Sample
    from .recipe import Recipe

REFERENCE_IMAGES = 100
EXPONENT = 0.25
# Epochs at 100 images, and the fewest. Their proportions are those of the recipe `bccd` (40, 12 and 3 for prune, distill and
# QAT), whose baseline took 30 epochs; what they give on other data: benchmarks/RESULTS.md, "One's own data".
EPOCHS = {
    "teacher": (100, 20),
    "baseline": (100, 20),
    "sparsify": (15, 5),
    "prune": (70, 20),
    "distill": (25, 8),
    "qat": (6, 2),
}
SMALL_SET, LARGE_SET = 500, 20_000  # images below which a batch has 8, from which it has 32
NOMINAL_BATCH, LONG_TRAINING = 64, 10_000  # Ultralytics' `optimizer=auto` counts steps of 64 images, changes at 10,000
# The gate: 98 % of the baseline's mAP50-95, or MLPerf's lower tier where so few validation images would judge chance. Two models
# that are equally good differ by 1 % on 87 images (standard error on BCCD, benchmarks/RESULTS.md), by more with the root of fewer.
MIN_RETENTION, MIN_RETENTION_FEW, FEW_VALIDATION_IMAGES = 0.98, 0.95, 50
STANDARD_ERROR, STANDARD_ERROR_IMAGES = 0.01, 87
SMALL_OBJECT_PX = 16  # two cells of the finest grid of YOLOv8, which has a cell every 8 px
LARGEST_PX = 1280
WHOLE_IMAGES, WHOLE_SHARE = 10, 5  # at most 10 epochs without mosaic, at most a fifth of all


@dataclass(frozen=True)
class Choice:
    """A value of a knob and why it is that."""

    value: Any
    why: str


def epochs(stage: str, images: int) -> Choice:
    """Epochs of a stage that trains on so many images."""
    reference, fewest = EPOCHS[stage]
    scaled = round(reference * (REFERENCE_IMAGES / max(images, REFERENCE_IMAGES)) ** EXPONENT)
    steps = math.ceil(images / batch(images).value)
    return Choice(max(scaled, fewest), f"{images:,} images are {steps:,} steps an epoch")


def batch(images: int) -> Choice:
    """Images a step."""
    if images < SMALL_SET:
        return Choice(8, f"fewer than {SMALL_SET} images: more steps an epoch")
    if images < LARGE_SET:
        return Choice(16, "Ultralytics' default")
    return Choice(32, f"{LARGE_SET:,} images or more: steps are plenty")


def close_mosaic(epochs: int) -> Choice:
    """Last epochs without mosaic."""
    return Choice(min(WHOLE_IMAGES, epochs // WHOLE_SHARE), "ends on whole images, as the validation sees them")


def optimizer(images: int, epochs: int) -> Choice:
    """Ultralytics' choice (8.4.190, `BaseTrainer.build_optimizer`): by the number of steps of 64 images."""
    steps = math.ceil(images / NOMINAL_BATCH) * epochs
    if steps > LONG_TRAINING:
        return Choice("MuSGD", f"{steps:,} steps of {NOMINAL_BATCH} images, a long training")
    return Choice("AdamW", f"{steps:,} steps of {NOMINAL_BATCH} images, a short training")


def lr0(optimizer: str, classes: int) -> Choice:
    """Ultralytics' choice (8.4.190, `BaseTrainer.build_optimizer`): for Adam and AdamW by the number of classes."""
    if optimizer in ("Adam", "AdamW"):
        return Choice(round(0.002 * 5 / (4 + classes), 6), f"0.002 * 5 / (4 + {classes} classes), as Ultralytics")
    return Choice(0.01, "as Ultralytics")


def imgsz(samples: Sequence[Sample], smallest_px: int) -> Choice:
    """Side of a square input in px: nine objects in ten have `SMALL_OBJECT_PX` at least, and no image is enlarged.

    Args:
        samples: Training images.
        smallest_px: The least side, unless the images themselves are smaller.
    """
    longest = statistics.median(max(sample.width, sample.height) for sample in samples)
    sides = sorted(
        math.sqrt(width * sample.width * height * sample.height) / max(sample.width, sample.height)
        for sample in samples
        for _, _, _, width, height in sample.boxes
    )
    small = sides[len(sides) // 10]  # as a share of the longer side of its image
    wanted = max(math.ceil(SMALL_OBJECT_PX / max(small, 1e-6) / IMGSZ_STEP) * IMGSZ_STEP, smallest_px)
    native = math.ceil(longest / IMGSZ_STEP) * IMGSZ_STEP
    side = max(min(wanted, native, LARGEST_PX), IMGSZ_STEP)
    why = f"one object in ten is smaller than {small * side:.0f} px at this size"
    if side == native < wanted:
        why += "; images are no larger"
    elif side == LARGEST_PX < wanted:
        why += "; consider tiles, they are small for a detector"
    return Choice(side, why)


def min_retention(validation_images: int) -> Choice:
    """Share of the baseline's mAP50-95 that the gate asks for."""
    chance = STANDARD_ERROR * math.sqrt(STANDARD_ERROR_IMAGES / validation_images)
    shown = f"on {validation_images:,} validation images equally good models differ by about {100 * chance:.1g} %"
    if validation_images < FEW_VALIDATION_IMAGES:
        return Choice(MIN_RETENTION_FEW, f"gate, share of the baseline's mAP50-95; {shown}: 0.98 would judge chance")
    return Choice(MIN_RETENTION, f"gate, share of the baseline's mAP50-95; {shown}")


def resolve(recipe: Recipe, images: int, classes: int) -> Recipe:
    """The recipe with a number in place of each `auto`, checked again as a whole.

    Args:
        recipe: As `recipe.load` gives it.
        images: Training images.
        classes: Classes of the data set.

    Raises:
        RecipeError: Knobs that contradict each other now that they are known.
    """
    found = {}
    for name in EPOCHS:
        section = getattr(recipe, name)
        if isinstance(section, TrainConfig) and not (isinstance(section, SourceConfig) and section.weights is not None):
            values = {knob: getattr(section, knob) for knob in type(section).model_fields}
            found[name] = section.model_copy(update=_numbers(name, values, images, classes))
    return recipe.replaced(found)


def said(asked: Recipe, resolved: Recipe) -> str | None:
    """One line of what became of each `auto`; None where there was none."""
    parts = []
    for name in EPOCHS:
        before, after = getattr(asked, name), getattr(resolved, name)
        if before is not None and before != after:
            knobs = (knob for knob in type(after).model_fields if getattr(before, knob) == "auto")
            parts.append(f"{name} " + " ".join(f"{knob}={getattr(after, knob)}" for knob in knobs))
    return "auto: " + "; ".join(parts) if parts else None


def _numbers(stage: str, values: dict[str, Any], images: int, classes: int) -> dict[str, Any]:
    """What the knobs of one section become; later rules read the results of earlier ones."""
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
