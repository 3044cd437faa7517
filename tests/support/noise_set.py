"""A data set of noise on disk, for tests that need a data set but no accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw(folder: Path, count: int, seed: int = 0, size_hw: tuple[int, int] = (48, 64)) -> None:
    """Write `count` PNGs of noise into a folder, which is made if missing. Files with the same names are replaced."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(generator.integers(0, 255, (*size_hw, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def noise_set(
    root: Path, train: int, val: int, names: Sequence[str] = ("bolt", "nut"), size_hw: tuple[int, int] = (48, 64)
) -> Path:
    """Write a data set under `root`, with one object in each image and the classes in turn. Return its data yaml."""
    for seed, (split, count) in enumerate((("train", train), ("val", val))):
        draw(root / "images" / split, count, seed, size_hw)
        (root / "labels" / split).mkdir(parents=True)
        for index in range(count):
            (root / f"labels/{split}/{index}.txt").write_text(f"{index % len(names)} 0.5 0.5 0.4 0.4\n")
    yaml = root / "set.yaml"
    yaml.write_text(f"train: images/train\nval: images/val\nnames: [{', '.join(names)}]\n")
    return yaml
