"""Pictures a second from JPEG files: the pipeline of `yolo-compress predict` against one picture at a time, in turn, in one run.

    python benchmarks/pipeline_throughput.py                   # builds YOLOv8n, INT8, 640 px; --engine DIR takes one there is
    python benchmarks/pipeline_throughput.py --engines 1 2

One at a time is `read_image` and `Detector` on an engine of all processors. Settings of a deployment (confidence 0.25, IoU 0.7).
A round takes every picture once with each, in ABBA order; the detections are compared. Prints a markdown table, and on the last
line JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from detector_engine import build

from yolo_compress import environment
from yolo_compress.data import load
from yolo_compress.runtime.detector import Detector
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.pipeline import open_pipeline
from yolo_compress.runtime.pre import read_image
from yolo_compress.runtime.sources import open_source
from yolo_compress.weights import find_weights

CONF, IOU = 0.25, 0.7
SEQUENTIAL = "one at a time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="directory of an engine; default: build one")
    parser.add_argument("--runtime", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--weights", default="yolov8n_coco.pt")
    parser.add_argument("--data", default="coco128.yaml")
    parser.add_argument("--precision", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--engines", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    dataset = load(args.data, allow_overlap=True)
    folder = dataset.val[0].image.parent
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        weights = find_weights(args.weights)
        engine = args.engine or build(args.runtime, args.precision, weights, dataset, args.imgsz, Path(scratch))
        backend = stack.enter_context(open_engine(engine))
        detector = Detector(backend, CONF, IOU, multi_label=False)

        def one_at_a_time() -> list[np.ndarray]:
            return [detector(picture.read()) for picture in open_source(folder).pictures]

        ways: dict[str, Callable[[], list[np.ndarray]]] = {SEQUENTIAL: one_at_a_time}
        for count in args.engines:
            pipeline = stack.enter_context(open_pipeline(engine, count, CONF, IOU))
            ways[f"pipeline of {count}"] = lambda run=pipeline: [  # type: ignore[misc]
                found.detections_N6 for found in run(open_source(folder).pictures)
            ]
        seconds, agree = measured(ways, args.rounds)
        executed = backend.executed
        decode = timed(lambda: [read_image(picture.name) for picture in open_source(folder).pictures])[0]
    report(seconds, agree, decode, args, open_source(folder).total or 0, executed)


def timed(run: Callable[[], list[np.ndarray]]) -> tuple[float, list[np.ndarray]]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def measured(ways: dict[str, Callable[[], list[np.ndarray]]], rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each round after one of warm-up, and whether all found the same."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    agree = True
    for number in range(-1, rounds):
        results = []
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            took, found = timed(ways[name])
            results.append(found)
            if number >= 0:
                seconds[name].append(took)
        agree &= all(
            len(a) == len(b) and np.allclose(a, b, atol=1e-2)
            for r in results[1:]
            for a, b in zip(results[0], r, strict=True)
        )
    return seconds, agree


def report(
    seconds: dict[str, list[float]], agree: bool, decode: float, args: argparse.Namespace, images: int, executed: str
) -> None:
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    print("| | pictures a second | ratio of medians | ratio by round | n |\n|---|---|---|---|---|")
    rows = {}
    for name, value in median.items():
        by_round = [base / own for base, own in zip(seconds[SEQUENTIAL], seconds[name], strict=True)]
        rows[name] = {"fps": images / value, "ratio": median[SEQUENTIAL] / value, "ratio_by_round": by_round}
        spread = f"{min(by_round):.2f} to {max(by_round):.2f}"
        print(f"| {name} | {images / value:.1f} | {rows[name]['ratio']:.3f} | {spread} | {len(by_round)} x {images} |")
    settings = {key: getattr(args, key) for key in ("runtime", "weights", "precision", "imgsz", "rounds", "data")}
    answer = {
        "settings": settings,
        "executed": executed,
        "images": images,
        "decode_ms": 1e3 * decode / images,
        "agree": agree,
    }
    print(json.dumps({**answer, "rows": rows, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
