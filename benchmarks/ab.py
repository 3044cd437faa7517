"""Seconds and memory of an A/B comparison of COCO's size: `evaluate.ab.comparison.compare` on invented detections.

    python benchmarks/ab.py --images 5000 --detections 100000 --replicates 1000 --classes 80

Truths are seven an image, of all sizes; each model finds most of them, displaced, and shows as much again that is wrong. Prints
a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np

from yolo_compress.evaluate.ab.comparison import compare
from yolo_compress.store import environment

TRUTHS = 7  # an image, as in COCO's val2017
SIDE = 640.0


def scene(images: int, classes: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Truths: class, xyxy."""
    truths = []
    for _ in range(images):
        corner = generator.uniform(0, SIDE * 0.8, (TRUTHS, 2))
        sides = np.exp(generator.uniform(np.log(10), np.log(300), (TRUTHS, 2)))
        truths.append(np.column_stack([generator.integers(0, classes, TRUTHS), corner, corner + sides]))
    return truths


def detected(truths: list[np.ndarray], total: int, classes: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Detections of one model, `total` over all images."""
    each = total // len(truths)
    out = []
    for rows in truths:
        right = rows[generator.random(len(rows)) < 0.85]
        sides = np.tile(right[:, 3:] - right[:, 1:3], 2)
        good = np.column_stack(
            [
                right[:, 1:] + generator.normal(0, 0.04, sides.shape) * sides,
                generator.beta(4, 2, len(right)),
                right[:, 0],
            ]
        )
        wrong = np.empty((each - len(good), 6))
        wrong[:, :2] = generator.uniform(0, SIDE * 0.8, (len(wrong), 2))
        wrong[:, 2:4] = wrong[:, :2] + np.exp(generator.uniform(np.log(10), np.log(300), (len(wrong), 2)))
        wrong[:, 4], wrong[:, 5] = generator.beta(1, 8, len(wrong)), generator.integers(0, classes, len(wrong))
        out.append(np.concatenate([good, wrong]).astype(np.float32))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100_000, help="of each model")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    truths = scene(args.images, args.classes, generator)
    both = [detected(truths, args.detections, args.classes, generator) for _ in "ab"]
    start = time.perf_counter()
    document = compare(truths, *both, [str(k) for k in range(args.classes)], replicates=args.replicates)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        "| images | detections of each | classes | replicates | s | peak of the process, GiB |\n|---|---|---|---|---|---|"
    )
    print(f"| {args.images} | {args.detections} | {args.classes} | {args.replicates} | {seconds:.1f} | {peak:.2f} |")
    print(document["verdict"]["line"])
    print(json.dumps({"settings": vars(args), "seconds": seconds, "peak_gib": peak, "map50_95": document["map50_95"],
                      "environment": environment.describe()}))  # fmt: skip


if __name__ == "__main__":
    main()
