"""Pictures a second from JPEG files: the pipeline of `yolo-compress predict` against one picture at a time, in turn, in one run.

    python benchmarks/pipeline_throughput.py                   # builds YOLOv8n, INT8, 640 px; --engine DIR takes one there is
    python benchmarks/pipeline_throughput.py --engines 1 2

The pictures are the photographs of the data set as they are (about 640x480), and scaled to 1280x720 (JPEG, quality 95).
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
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detector_engine import build

from yolo_compress.data.dataset import Dataset, load
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.sources import open_source
from yolo_compress.runtime.detect.stream import Pipeline, open_pipeline
from yolo_compress.runtime.engine import open_engine
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights

CONF, IOU = 0.25, 0.7
SEQUENTIAL = "one at a time"
Way = Callable[[], list[np.ndarray]]


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
    with tempfile.TemporaryDirectory() as scratch:
        weights, folders = find_weights(args.weights), folders_of(dataset, Path(scratch))
        engine = args.engine or build(
            args.runtime, args.precision, weights, dataset, args.imgsz, Path(scratch) / "built"
        )
        rows = {}
        with ExitStack() as stack:
            backend = stack.enter_context(open_engine(engine))
            executed = backend.executed
            detector = Detector(backend, CONF, IOU, multi_label=False)
            pipelines = {count: stack.enter_context(open_pipeline(engine, count, CONF, IOU)) for count in args.engines}
            for size, folder in folders.items():
                rows[size] = measured(ways(detector, pipelines, folder), args.rounds, len(dataset.val))
                decode = timed(lambda: [picture.read() for picture in open_source(folder).images])[0]  # noqa: B023
                rows[size]["decode_ms"] = round(1e3 * decode / len(dataset.val), 3)
    settings = {key: getattr(args, key) for key in ("runtime", "weights", "precision", "imgsz", "rounds", "data")}
    report(rows, {"settings": settings, "executed": executed, "environment": environment.describe()})


def folders_of(dataset: Dataset, scratch: Path) -> dict[str, Path]:
    """Folders of the same photographs."""
    large = scratch / "large"
    large.mkdir()
    for sample in dataset.val:
        scaled = cv2.resize(cv2.imread(str(sample.image)), (1280, 720))
        cv2.imwrite(str(large / f"{sample.image.stem}.jpg"), scaled, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return {"as they are": dataset.val[0].image.parent, "1280x720": large}


def ways(detector: Detector, pipelines: dict[int, Pipeline], folder: Path) -> dict[str, Way]:
    """What takes every picture once, by name."""

    def one_at_a_time() -> list[np.ndarray]:
        return [detector(picture.read()) for picture in open_source(folder).images]

    def piped(pipeline: Pipeline) -> list[np.ndarray]:
        return [found.detections_N6 for found in pipeline(open_source(folder).images)]

    return {SEQUENTIAL: one_at_a_time} | {f"{count} engines": partial(piped, run) for count, run in pipelines.items()}


def timed(run: Callable[[], list[np.ndarray]]) -> tuple[float, list[np.ndarray]]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def measured(calls: dict[str, Way], rounds: int, images: int) -> dict[str, Any]:
    """Rounds after one of warm-up, and whether all ways found the same."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    agree = True
    for number in range(-1, rounds):
        results = []
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            took, found = timed(calls[name])
            results.append(found)
            if number >= 0:
                seconds[name].append(took)
        agree &= all(same(results[0], other) for other in results[1:])
    row: dict[str, Any] = {"images": images, "agree": agree, "fps": {}, "ratio": {}, "ratio_by_round": {}}
    for name, values in seconds.items():
        by_round = [base / own for base, own in zip(seconds[SEQUENTIAL], values, strict=True)]
        row["fps"][name] = round(images / float(np.median(values)), 2)
        row["ratio"][name] = round(float(np.median(seconds[SEQUENTIAL]) / np.median(values)), 3)
        row["ratio_by_round"][name] = [round(value, 3) for value in by_round]
    return row


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """Whether the detections agree to a hundredth of a pixel: engines of other thread counts may round differently."""
    return all(a.shape == b.shape and np.allclose(a, b, atol=1e-2) for a, b in zip(first, second, strict=True))


def report(rows: dict[str, Any], about: dict[str, Any]) -> None:
    print("| pictures | | a second | ratio of medians | by round | n |\n|---|---|---|---|---|---|")
    for size, row in rows.items():
        for name, by_round in row["ratio_by_round"].items():
            spread = f"{min(by_round):.2f} to {max(by_round):.2f}"
            count = f"{len(by_round)} x {row['images']}"
            print(f"| {size} | {name} | {row['fps'][name]:.1f} | {row['ratio'][name]:.2f} | {spread} | {count} |")
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
