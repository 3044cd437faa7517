"""How much detectors differ that are about as good: what `yolo-compress rollout` sets its budgets above.

    python benchmarks/disagreement.py weights/bccd/bench --runtime onnxruntime

Of each engine of a `bench` artefact against the original in FP32, from score 0.25 on: the share of boxes without a partner at IoU 0.5,
the shift of counts and of scores, as the rules of a rollout define them. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from yolo_compress.rollout.judge import count_shift, disagreement, score_shift
from yolo_compress.rollout.shadow_log import Frame, partners

CONF = 0.25


def frames(file: Path, images: int) -> list[Frame]:
    """A frame an image."""
    rows_N7 = np.load(file, allow_pickle=False)
    rows_N7 = rows_N7[rows_N7[:, 5] >= CONF].astype(np.float64)
    return [Frame(str(i), float(i), 1.0, rows_N7[rows_N7[:, 0] == i, 1:], None) for i in range(images)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="folder of a bench artefact")
    parser.add_argument("--runtime", default="onnxruntime")
    asked = parser.parse_args()
    files = sorted((asked.bench / "detections").glob(f"*-{asked.runtime}-*.npy"))
    base = next(file for file in files if file.name == f"original-{asked.runtime}-fp32.npy")
    images = 1 + int(max(np.load(file)[:, 0].max() for file in files))
    found = []
    print("| engine | boxes without partner | count | score |\n|---|---|---|---|")
    for file in files:
        pairs = [(a, b, partners(a, b)) for a, b in zip(frames(base, images), frames(file, images), strict=True)]
        row = {
            "engine": file.stem,
            "disagreement": float(np.mean([disagreement(a, b, p) for a, b, p in pairs])),
            "count": float(np.mean([count_shift(a, b) for a, b, _ in pairs])),
            "score": float(np.mean([score_shift(a, b, p) for a, b, p in pairs if p])),
        }
        found.append(row)
        print(f"| {row['engine']} | {row['disagreement']:.3f} | {row['count']:+.3f} | {row['score']:+.3f} |")
    print(json.dumps({"bench": str(asked.bench), "images": images, "conf": CONF, "rows": found}))


if __name__ == "__main__":
    main()
