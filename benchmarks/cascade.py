"""One model at two sizes as a cascade, against the sizes between them: YOLOv8n on BCCD at 192 and 320 px.

    YOLO_COMPRESS_DATA=... python benchmarks/cascade.py --weights yolov8n_bccd.pt --sizes 192 256 320

The first and the last size are the cascade, the sizes between are static models of the same checkpoint, each compared in a run of its
own. The first run chooses the share of images itself. The others have a mean latency at the given shares of the way from the small to
the large model's. Prints a markdown table, and on the last line JSON with the cascade document of each run, and the median time of the
router alone in microseconds by the number of detections.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from yolo_compress.cli.cascade import Settings, run
from yolo_compress.evaluate.cascade.schema import CascadeDocument
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.detect.cascade import Part, Policy
from yolo_compress.runtime.engine import BACKENDS
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
        columns = (corner_N2, corner_N2 + 60, np.sort(generator.random((count, 1)))[::-1], np.zeros((count, 1)))
        rows_N6 = np.hstack(columns).astype(np.float32)
        samples_ms = measure(partial(policy.hands_over, rows_N6, 320, 320), 500)
        found[count] = round(float(np.median(samples_ms)) * 1e3, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 256, 320], help="px, rising")
    parser.add_argument("--runtime", default="openvino", choices=sorted(BACKENDS))
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75], help="of the way, for latency_ms")
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
    router = router_us(np.array(first["router"]["weights"]))
    print(json.dumps({"runs": runs, "router_us": router, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
