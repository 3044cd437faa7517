"""What `Detector` adds to the bare engine, against Ultralytics' `YOLO(...).predict` on the same OpenVINO engine, in one run.

    python benchmarks/detector_overhead.py                     # builds YOLOv8n, INT8, 640 px; --engine DIR takes one there is
    python benchmarks/detector_overhead.py --threads 1

Decoded frames of 640x480 and 1280x720 (scaled photographs), settings of a deployment (confidence 0.25, IoU 0.7, one class a box).
Blocks of frames in turn, in ABBA order: the bare engine on inputs letterboxed before, `Detector`, Ultralytics. A frame's overhead
is its time less the time inside the engine call of that frame, which for Ultralytics is its own
`speed["inference"]`. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from detector_engine import build

from yolo_compress.data.dataset import load
from yolo_compress.nets.hardening import harden
from yolo_compress.runtime.backends.openvino import ENGINE_FILE, WEIGHTS_FILE, OpenVINOBackend
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import letterbox, read_image
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights

CONF, IOU = 0.25, 0.7
SIZES = ((640, 480), (1280, 720))
Timed = Callable[[int], tuple[float, float]]  # number of a frame -> seconds in all, seconds in the engine


class Clocked:
    """A backend that remembers how long its last call took."""

    needs_nms = True

    def __init__(self, backend: OpenVINOBackend) -> None:
        self.backend, self.names, self.imgsz, self.batch = backend, backend.names, backend.imgsz, backend.batch
        self.seconds = 0.0

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        start = time.perf_counter()
        output = self.backend(images_BCHW, copy)
        self.seconds = time.perf_counter() - start
        return output


def ultralytics_form(engine: Path, backend: OpenVINOBackend, folder: Path) -> Path:
    """The same IR in a folder as Ultralytics' export writes it."""
    out = folder / "engine_openvino_model"
    out.mkdir()
    shutil.copyfile(engine / ENGINE_FILE, out / "engine.xml")
    shutil.copyfile(engine / WEIGHTS_FILE, out / "engine.bin")
    said = {
        "stride": 32,
        "task": "detect",
        "batch": 1,
        "imgsz": list(backend.imgsz),
        "names": dict(enumerate(backend.names)),
    }
    (out / "metadata.yaml").write_text(yaml.safe_dump(said))
    return out


def contenders(backend: OpenVINOBackend, predict: Any, frames: list[np.ndarray]) -> dict[str, Timed]:
    clocked = Clocked(backend)
    detector = Detector(clocked, CONF, IOU, multi_label=False)  # type: ignore[arg-type]
    bound = [backend.bind(letterbox(frame, backend.imgsz)[0][None]) for frame in frames]
    bgr = [np.ascontiguousarray(frame[..., ::-1]) for frame in frames]

    def bare(i: int) -> tuple[float, float]:
        start = time.perf_counter()
        bound[i]()
        seconds = time.perf_counter() - start
        return seconds, seconds

    def ours(i: int) -> tuple[float, float]:
        start = time.perf_counter()
        detector(frames[i])
        return time.perf_counter() - start, clocked.seconds

    def theirs(i: int) -> tuple[float, float]:
        start = time.perf_counter()
        (found,) = predict(bgr[i])
        return time.perf_counter() - start, found.speed["inference"] / 1e3

    return {"bare engine": bare, "Detector": ours, "Ultralytics": theirs}


def agreement(backend: OpenVINOBackend, predict: Any, frames: list[np.ndarray]) -> dict[str, int]:
    """Boxes of both on the same frames; they need not be equal, as Ultralytics lets OpenVINO compute float layers in bfloat16."""
    detector = Detector(backend, CONF, IOU, multi_label=False)
    mine = [len(detector(frame)) for frame in frames]
    other = [len(predict(np.ascontiguousarray(frame[..., ::-1]))[0]) for frame in frames]
    return {"Detector": sum(mine), "Ultralytics": sum(other)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="directory of an OpenVINO engine; default: build one")
    parser.add_argument("--weights", default="yolov8n_coco.pt")
    parser.add_argument("--data", default="coco128.yaml")
    parser.add_argument("--precision", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    harden()
    dataset = load(args.data, allow_overlap=True)
    photographs = [read_image(sample.image) for sample in dataset.val[: args.images]]
    with tempfile.TemporaryDirectory() as scratch:
        engine = args.engine or build(
            "openvino", args.precision, find_weights(args.weights), dataset, args.imgsz, Path(scratch)
        )
        with OpenVINOBackend(engine, args.threads) as backend:
            model = ultralytics_predictor(ultralytics_form(engine, backend, Path(scratch)))
            rows = {}
            for width, height in SIZES:
                frames = [cv2.resize(photograph, (width, height)) for photograph in photographs]
                rows[f"{width}x{height}"] = measured(contenders(backend, model, frames), len(frames), args.rounds)
                rows[f"{width}x{height}"]["boxes"] = agreement(backend, model, frames)
            report(rows, args, backend.executed, backend.threads)


def ultralytics_predictor(folder: Path) -> Callable[[np.ndarray], Any]:
    from ultralytics import YOLO

    model = YOLO(str(folder), task="detect")
    return lambda frame: model.predict(frame, conf=CONF, iou=IOU, device="cpu", verbose=False)


def measured(calls: dict[str, Timed], frames: int, rounds: int) -> dict[str, Any]:
    """Medians in ms; the first frame of every block warms up."""
    whole: dict[str, list[float]] = {name: [] for name in calls}
    inside: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):  # two rounds of warm-up
        for name in list(calls) if number % 2 == 0 else list(calls)[::-1]:
            calls[name](0)
            for i in range(frames):
                seconds, engine = calls[name](i)
                if number >= 0:
                    whole[name].append(1e3 * seconds)
                    inside[name].append(1e3 * engine)
    median = {name: float(np.median(values)) for name, values in whole.items()}
    return {
        "n": rounds * frames,
        "frame_ms": {name: round(value, 3) for name, value in median.items()},
        "overhead_ms": {
            name: round(float(np.median(np.subtract(whole[name], inside[name]))), 3)
            for name in ("Detector", "Ultralytics")
        },
        "over_bare_ms": {name: round(median[name] - median["bare engine"], 3) for name in ("Detector", "Ultralytics")},
    }


def report(rows: dict[str, Any], args: argparse.Namespace, executed: str, threads: int) -> None:
    print("| frame | | ms a frame | outside the engine, ms | over the bare engine, ms | n |\n|---|---|---|---|---|---|")
    for size, row in rows.items():
        row["ratio"] = round(row["overhead_ms"]["Detector"] / row["overhead_ms"]["Ultralytics"], 3)
        for name, value in row["frame_ms"].items():
            columns = [f"{row[key][name]:.2f}" if name in row[key] else "" for key in ("overhead_ms", "over_bare_ms")]
            print(f"| {size} | {name} | {value:.2f} | {' | '.join(columns)} | {row['n']} |")
        print(f"| {size} | ratio of the overheads | | {row['ratio']:.2f} | | |")
    settings = {key: getattr(args, key) for key in ("weights", "precision", "imgsz", "images", "rounds")}
    described = {"settings": {**settings, "threads": threads, "conf": CONF, "iou": IOU}, "executed": executed}
    print(json.dumps({**described, "rows": rows, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
