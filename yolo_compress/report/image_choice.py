"""Choose images for the gallery: with the most lost objects, with the most new false positives, and random images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yolo_compress.evaluate.ab.schema import Flip

# Section of the gallery -> title and description, in the order of the page.
SECTIONS = {
    "lost": ("Worst losses", "Images with most objects that only the baseline finds."),
    "invented": ("New false positives", "Images with detections of the compressed model alone that match no object."),
    "random": ("Random images", "Drawn from all other images with the recipe's seed."),
}  # fmt: skip


def choose(flips: Sequence[Flip], images: int, count: int, seed: int) -> list[tuple[str, int]]:
    """Return (section, image index) of at most `count` images per section. No image is chosen twice.

    Args:
        flips: Images on which the models differ.
        images: Number of validation images.
        count: Largest number of images per section.
        seed: Seed for the random images.
    """
    lost = sorted(
        (flip for flip in flips if flip["lost"]), key=lambda flip: (-flip["lost"], flip["gained"], flip["image"])
    )
    chosen = [("lost", flip["image"]) for flip in lost[:count]]
    used = {image for _, image in chosen}
    invented = [flip for flip in flips if flip["new_false_positives"] and flip["image"] not in used]
    invented.sort(key=lambda flip: (-flip["new_false_positives"], flip["image"]))
    chosen += [("invented", flip["image"]) for flip in invented[:count]]
    used = {image for _, image in chosen}
    rest = [image for image in range(images) if image not in used]
    drawn = np.random.default_rng(seed).permutation(len(rest))[:count]
    return chosen + [("random", rest[place]) for place in sorted(drawn.tolist())]
