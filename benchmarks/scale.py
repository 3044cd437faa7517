"""Time and memory at the size of COCO: 118,287 training and 5,000 validation images of 16 px, 80 classes, labels as many as COCO's.

python benchmarks/scale.py make FOLDER
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

TRAIN, VAL, CLASSES = 118_287, 5_000, 80
SIDE_PX = 16
BOXES = 7.3  # mean of an image in COCO
EMPTY = 0.0086  # fraction of COCO's training images without an object


def make(folder: Path, train: int, val: int) -> None:
    """Write a data set of `train` + `val` images into `folder`, with `scale.yaml`. Every image has bytes of its own."""
    import cv2

    generator = np.random.default_rng(0)
    share_K = 1 / np.arange(1, CLASSES + 1)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        images = generator.integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), np.uint8)
        boxes = np.minimum(generator.geometric(1 / BOXES, count), 93) * (generator.random(count) > EMPTY)
        classes = generator.choice(CLASSES, boxes.sum(), p=share_K / share_K.sum())
        sides = np.exp(generator.uniform(np.log(0.02), np.log(0.6), (boxes.sum(), 2)))
        centres = sides / 2 + generator.random((boxes.sum(), 2)) * (1 - sides)
        rows = [
            f"{k} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n"
            for k, (x, y), (w, h) in zip(classes.tolist(), centres.tolist(), sides.tolist(), strict=True)
        ]
        first = 0
        for number, (image, n) in enumerate(zip(images, boxes.tolist(), strict=True)):
            (folder / "images" / split / f"{number:012}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
            if n:
                (folder / "labels" / split / f"{number:012}.txt").write_text("".join(rows[first : first + n]))
            first += n
    names = [f"class {k}" for k in range(CLASSES)]
    (folder / "scale.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(names)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=TRAIN)
    parser.add_argument("--val", type=int, default=VAL)
    args = parser.parse_args()
    start = time.perf_counter()
    make(args.folder, args.train, args.val)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
