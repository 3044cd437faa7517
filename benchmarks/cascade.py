"""One model at two sizes as a cascade, against the sizes between them: YOLOv8n on BCCD at 192 and 320 px.

    YOLO_COMPRESS_DATA=... python benchmarks/cascade.py --weights yolov8n_bccd.pt --sizes 192 256 320

The first and the last size are the cascade, the sizes between are static models of the same checkpoint, each compared in a run of its
own. The first run chooses the share of images itself. The others have a mean latency at the given shares of the way from the small to
the large model's. Prints a markdown table, and what the router costs beside the small model alone: the time that a cascade adds to an
image which it does not hand over, and the time from a decoded image to the small model's detections. The last line is JSON with the
cascade document of each run, the cost of the router, and the median time of its decision in microseconds by the number of detections.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from yolo_compress.cli.cascade import Settings, run
from yolo_compress.data.dataset import load
from yolo_compress.evaluate.cascade.schema import CascadeDocument
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.detect.cascade import CascadeEngine, Part, Policy
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.measure.end_to_end import CONF
from yolo_compress.runtime.measure.latency import measure
from yolo_compress.store import environment
from yolo_compress.train.checkpoint import load_model


def build(weights: Path, sizes: list[int], runtime: str, scratch: Path) -> dict[int, Path]:
    """Export the checkpoint in FP32 at each size, and build an engine of each."""
    model = load_model(weights).eval()
    names = [model.names[k] for k in range(len(model.names))]
    engines = {}
    for side in sizes:
        onnx = scratch / f"{side}.onnx"
        export_onnx(model, onnx, (side, side), names=names)
        engines[side] = scratch / f"{runtime}-{side}"
        BACKENDS[runtime].build(onnx, engines[side], "fp32")
    return engines


def row(name: str, found: CascadeDocument) -> str:
    """Return a line of the table."""
    own, control, verdict = found["cascade"], found["control"], found["verdict"]
    if own is None or control is None:
        return f"| {name} | - | - | - | - | {verdict['line']} |"
    span = f"{verdict['delta']:+.4f} ({verdict['low']:+.4f} to {verdict['high']:+.4f})"
    latency = f"{own['mean_ms']:.2f} / {own['p50_ms'] or 0:.2f} / {own['p99_ms'] or 0:.2f}"
    return f"| {name} | {own['kept']:.0%} | {own['map50_95']:.3f} | {latency} | {span} | {verdict['status']} |"


def router_us(weights_F: np.ndarray) -> dict[int, float]:
    """Return the median time of a decision, in microseconds, by the number of detections that the router sees."""
    part = Part("small", "", "fp32", (0, 0))
    policy = Policy(part, part, (), weights_F, 0.0, 0.0)
    generator, found = np.random.default_rng(0), {}
    for count in (0, 4, 16, 64):
        corner_N2 = generator.uniform(0, 200, (count, 2))
        columns = (corner_N2, corner_N2 + 60, np.sort(generator.random((count, 1)), axis=0)[::-1], np.zeros((count, 1)))
        rows_N6 = np.hstack(columns).astype(np.float32)
        samples_ms = measure(partial(policy.hands_over, rows_N6, 320, 320), 500)
        found[count] = round(float(np.median(samples_ms)) * 1e3, 1)
    return found


WARMUP_MS, WARMUP_N = 5.0, 3  # before each of the many short measurements of an image


class Cost(TypedDict):
    """What the router costs, as medians over the images."""

    images: int
    router_ms: float  # NMS at the router's threshold in place of the deployment's, features and decision
    small_ms: float  # the small model alone, from a decoded image to its detections
    share: float  # median of the ratio of both


def router_cost(engine: Path, weights_F: np.ndarray, images: list[Path], rounds: int = 10, calls: int = 20) -> Cost:
    """Measure what the router adds to an image that is not handed over. Both forms of the steps after the engine take turns."""
    part = Part("small", "", "fp32", (0, 0))
    with open_engine(engine) as backend:
        never = Policy(part, part, tuple(backend.names), weights_F, 0.0, math.inf)
        alone = Detector(backend, CONF, multi_label=False)
        cascade = Detector(CascadeEngine(backend, backend, never), CONF, multi_label=False)
        costs = []
        for file in images:
            image_HW3 = read_image(file)
            input_BCHW, placed = alone.prepare([image_HW3], alone.blank())
            output_BCA = backend(input_BCHW)
            small_ms = measure(partial(alone, image_HW3), calls, WARMUP_MS, WARMUP_N)
            without = partial(alone.found, output_BCA, placed)
            with_router = partial(cascade.completed, [image_HW3], output_BCA, placed, list)
            added_ms = [
                np.median(measure(with_router, calls, WARMUP_MS, WARMUP_N))
                - np.median(measure(without, calls, WARMUP_MS, WARMUP_N))
                for _ in range(rounds)
            ]
            costs.append((float(np.median(added_ms)), float(np.median(small_ms))))
    router_ms, small_ms = np.array(costs).T
    return {
        "images": len(images),
        "router_ms": float(np.median(router_ms)),
        "small_ms": float(np.median(small_ms)),
        "share": float(np.median(router_ms / small_ms)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 256, 320], help="px, rising")
    parser.add_argument("--runtime", default="openvino", choices=sorted(BACKENDS))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75], help="of the way, for latency_ms")
    parser.add_argument("--images", type=int, default=50, help="validation images that the router is timed on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs: dict[str, CascadeDocument] = {}
    with tempfile.TemporaryDirectory() as name:
        engines = build(args.weights, args.sizes, args.runtime, Path(name))
        small, large = (str(engines[side]) for side in (args.sizes[0], args.sizes[-1]))

        def one(label: str, static: str | None, latency_ms: float | None = None) -> CascadeDocument:
            out = Path(name) / f"cascade-{len(runs)}"
            runs[label] = run(Settings(small, large, args.data, out, static, latency_ms, seed=args.seed))
            print(row(label, runs[label]), flush=True)
            return runs[label]

        print("| run | small alone | mAP50-95 | mean / p50 / p99 ms | cascade - control (95 %) | verdict |")
        print("|---|---|---|---|---|---|")
        first = one("free", None)
        for side in args.sizes[1:-1]:
            one(f"beside {side} px", str(engines[side]))
        for share in args.shares:
            low, high = first["small"]["mean_ms"], first["large"]["mean_ms"]
            one(f"{share:.0%} of the way", None, low + share * (high - low))
        weights_F = np.array(first["router"]["weights"])
        val = load(args.data).val
        timed = [val[i * len(val) // args.images].image for i in range(min(args.images, len(val)))]
        cost = router_cost(engines[args.sizes[0]], weights_F, timed)
    print(
        f"\nRouter: {cost['router_ms']:.3f} ms beside {cost['small_ms']:.3f} ms of the small model, {cost['share']:.1%}"
    )
    found = {"runs": runs, "router": cost, "router_us": router_us(weights_F), "environment": environment.describe()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
