"""Seconds and memory of planning and surgery on a large network: groups, plan, hand-over and cut, weights random.

    python benchmarks/pruning_planning.py --model yolov8l.yaml --imgsz 640

`--images 4` also looks at that many images, which criterion `obs` and the hand-over need; their time is the network's, on
whatever computes it. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.reconstruct import reconstruct
from yolo_compress.store import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov8l.yaml")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--keep-flops", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=0, help="0: criterion bn_gamma, no hand-over")
    args = parser.parse_args()
    size = (args.imgsz, args.imgsz)
    model = DetectionModel(args.model, verbose=False).eval()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[what] = time.perf_counter() - start

    with timed("groups"):
        groups = prunable(model)
    images = [torch.rand(1, 3, *size) for _ in range(args.images)]
    evidence = Evidence(model, groups, images=lambda: images)
    if images:
        with timed(f"moments of {len(images)} images"):
            _ = evidence.moments
    criterion = "obs" if images else "bn_gamma"
    with timed(f"criterion {criterion}"):
        importance = scores(evidence, find(criterion))
    with timed("plan"):
        shapes = conv_shapes(model, size)
        plan = choose(model, groups, importance, keep_flops(shapes, args.keep_flops), 16, shapes)
    if images:
        with timed("hand-over"):
            reconstruct(model, groups, plan.keep, evidence.moments)
    with timed("surgery"):
        prune(model, plan.keep)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("| step | s |\n|---|---|")
    for what, value in seconds.items():
        print(f"| {what} | {value:.1f} |")
    print(f"| all, peak of the process {peak:.1f} GiB | {sum(seconds.values()):.1f} |")
    print(json.dumps({"settings": vars(args), "seconds": seconds, "peak_gib": peak, "kept_flops": plan.kept_flops,
                      "environment": environment.describe()}))  # fmt: skip


if __name__ == "__main__":
    main()
