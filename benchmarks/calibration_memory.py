"""Peak memory of a calibration as its images grow: each count in a process of its own, the images read one batch at a time.

    python benchmarks/calibration_memory.py --weights yolov8n_coco.pt --data neu_det.yaml --imgsz 224 --counts 100 1000

Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from functools import partial

from yolo_compress.data.dataset import calibration_subset, load
from yolo_compress.quant.calibrate import CALIBRATORS, ptq
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def peak_mib(args: argparse.Namespace, method: str, count: int) -> float:
    """Of a process that calibrates on `count` images."""
    command = [sys.executable, __file__, "--weights", args.weights, "--data", args.data, "--imgsz", str(args.imgsz)]
    done = subprocess.run(
        [*command, "--one", method, str(count)], stdout=subprocess.PIPE, check=True, env=dict(os.environ), text=True
    )
    return float(done.stdout.splitlines()[-1])


def one(args: argparse.Namespace) -> None:
    method, count = args.one[0], int(args.one[1])
    size = (args.imgsz, args.imgsz)
    images = calibration_subset(load(args.data).train, count, 0)
    if len(images) != count:
        raise SystemExit(f"{args.data} has {len(images)} training images, {count} were asked for")
    ptq(checkpoint.load_model(find_weights(args.weights)), partial(letterboxed, images, size), method)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_coco.pt")
    parser.add_argument("--data", default="neu_det.yaml")
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--counts", type=int, nargs=2, default=[100, 1000])
    parser.add_argument("--methods", nargs="+", default=sorted(CALIBRATORS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args)
    rows = {method: [peak_mib(args, method, count) for count in args.counts] for method in args.methods}
    few, many = args.counts
    print(f"| calibrator | {few} images, MiB | {many} images, MiB | more, MiB |\n|---|---|---|---|")
    for method, (low, high) in rows.items():
        print(f"| {method} | {low:.0f} | {high:.0f} | {high - low:+.0f} |")
    settings = {key: value for key, value in vars(args).items() if key != "one"}
    print(json.dumps({"settings": settings, "peak_mib": rows, "environment": environment.describe()}))
    return None


if __name__ == "__main__":
    main()
