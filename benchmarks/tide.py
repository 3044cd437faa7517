"""`evaluate/tide.py` against the original, `tidecv` 1.0.1, on random sets: counts and costs of every error type.

    pip install tidecv    # in an environment of its own: it brings pandas and seaborn
    python benchmarks/tide.py

Both are given the same recall grid (k / 100); ours is COCO's `linspace`, which differs in the last bit of some recalls.
"""

from __future__ import annotations

import argparse

import numpy as np

from yolo_compress.evaluate import tide

SHORT = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=30)
    parser.add_argument("--images", type=int, default=40)
    args = parser.parse_args()
    tide.RECALLS_R = np.arange(101) / 100
    worst, counted = 0.0, 0
    for seed in range(args.sets):
        truths, detections = random_set(seed, args.images)
        ours, theirs = tide.errors(truths, detections), original(truths, detections)
        for entry in ours["types"]:
            count, cost = theirs[entry["name"]]
            assert count == entry["count"], f"set {seed}, {entry['name']}: {entry['count']}, tidecv {count}"
            worst, counted = max(worst, abs(cost - entry["cost"])), counted + count
        for name in ("false_positives", "false_negatives", "ap50"):
            mine = ours[name] if name == "ap50" else ours[name]["cost"]
            worst = max(worst, abs(theirs[name][1] - mine))
    print(f"{args.sets} sets, {counted} errors: all counts equal, largest difference of a cost {worst:.1e}")


def random_set(seed: int, images: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Truths with jittered, doubled, mislabelled and invented detections; every class has a truth in the first image."""
    r = np.random.default_rng(seed)
    classes = int(r.integers(1, 5))
    truths, detections = [], []
    for image in range(images):
        xy = r.uniform(0, 80, (int(r.integers(0, 7)), 2))
        truth = np.column_stack([r.integers(0, classes, len(xy)), xy, xy + r.uniform(8, 40, xy.shape)])
        if image == 0:
            truth = np.array([[k, 10 * k, 0, 10 * k + 9, 9] for k in range(classes)], float)
        near = np.repeat(truth, r.integers(0, 4, len(truth)), axis=0)
        boxes = near[:, 1:] + r.normal(0, 1, (len(near), 4)) * r.choice([1, 4, 10], (len(near), 1))
        label = np.where(r.random(len(near)) < 0.7, near[:, 0], r.integers(0, classes, len(near)))
        xy = r.uniform(0, 90, (int(r.integers(0, 5)), 2))
        boxes = np.concatenate([boxes, np.column_stack([xy, xy + r.uniform(5, 30, xy.shape)])])
        label = np.concatenate([label, r.integers(0, classes, len(xy))])
        found = np.column_stack([boxes, r.uniform(0.001, 1, len(boxes)), label])
        truths.append(truth)
        detections.append(found[(found[:, 2] > found[:, 0] + 1) & (found[:, 3] > found[:, 1] + 1)])
    return truths, detections


def original(truths: list[np.ndarray], detections: list[np.ndarray]) -> dict[str, tuple[int, float]]:
    """tidecv's count and cost of each type."""
    from tidecv.data import Data
    from tidecv.quantify import TIDE

    actual, found = Data("truth", max_dets=100), Data("found", max_dets=100)
    for image, (truth, rows) in enumerate(zip(truths, detections, strict=True)):
        for data in (actual, found):
            data.add_image(image, str(image))
        for label, x1, y1, x2, y2 in truth.tolist():
            actual.add_ground_truth(image, int(label), [x1, y1, x2 - x1, y2 - y1])
        for x1, y1, x2, y2, score, label in rows.tolist():
            found.add_detection(image, int(label), score, [x1, y1, x2 - x1, y2 - y1])
    judge = TIDE()
    run = judge.evaluate(actual, found, mode=TIDE.BOX)
    counts = {kind.short_name: len(errors) for kind, errors in run.error_dict.items()}
    costs, special = judge.get_main_errors()["found"], judge.get_special_errors()["found"]
    result = {SHORT[name]: (counts[name], cost / 100) for name, cost in costs.items()}
    result |= {"false_positives": (0, special["FalsePos"] / 100), "false_negatives": (0, special["FalseNeg"] / 100)}
    return {**result, "ap50": (0, run.ap / 100)}


if __name__ == "__main__":
    main()
