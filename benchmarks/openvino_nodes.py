"""An INT8 engine of OpenVINO: the time of its nodes by kind, and what bfloat16 in its float nodes would give.

    python benchmarks/openvino_nodes.py weights/bccd/engine/original/openvino-int8 weights/bccd/engine/compressed/openvino-int8 \
        --data bccd.yaml --threads 1

bfloat16 in the float nodes is INFERENCE_PRECISION_HINT bf16, in place of f32. It needs a processor with AMX or AVX512_BF16; on others
the plugin refuses it. Both compiled graphs are timed in turn in this process; the ratio is the median over rounds of ratios of medians.
Differences are those of the engine's own outputs on validation images: scores, and the sides of boxes with a score of 0.25 or more.
Times of nodes are the minimum over runs, so their sum is less than the latency. Prints markdown tables, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from yolo_compress.data.dataset import load
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment

HINTS = ("f32", "bf16")


def compiled(engine: Path, hint: str, threads: int, **extra: str) -> Any:
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": hint,
        **extra,
    }
    return openvino.Core().compile_model(str(engine / "engine.xml"), "CPU", config)


def shares(engine: Path, image: NDArray[np.float32], threads: int, runs: int) -> dict[str, tuple[int, float]]:
    """Return for each kind of node, as in `Convolution u8`, their number and the sum of their times in ms."""
    graph = compiled(engine, "f32", threads, PERF_COUNT="YES")
    infos = {one.get_friendly_name(): one.get_rt_info() for one in graph.get_runtime_model().get_ops()}
    kinds = {name: f"{info['layerType'].get()} {info['runtimePrecision'].get()}" for name, info in infos.items()}
    request, least = graph.create_infer_request(), dict[str, float]()
    for _ in range(runs):
        request.infer([image])
        for node in request.profiling_info:
            took = node.real_time.total_seconds() * 1e3
            least[node.node_name] = min(took, least.get(node.node_name, took))
    found: dict[str, list[float]] = defaultdict(list)
    for name, took in least.items():
        if took > 0:
            found[kinds.get(name, "other")].append(took)
    return {kind: (len(each), sum(each)) for kind, each in sorted(found.items(), key=lambda item: -sum(item[1]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+", help="folders of INT8 engines of OpenVINO")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--samples", type=int, default=30, help="inferences a round")
    args = parser.parse_args()
    answer: list[dict[str, Any]] = []
    for engine in args.engines:
        with open_engine(engine, threads=1) as backend:
            size = backend.imgsz
        images = [batch.numpy() for batch in letterboxed(load(args.data).val[: args.images], size, batch=1)]
        requests = {hint: compiled(engine, hint, args.threads).create_infer_request() for hint in HINTS}
        first, other = (
            np.concatenate([request.infer([image])[0].copy() for image in images]) for request in requests.values()
        )
        apart, seen = np.abs(first - other), first[:, 4:].max(axis=1) >= 0.25
        medians = np.zeros((args.rounds, len(HINTS)))
        for row in medians:
            for column, request in enumerate(requests.values()):
                taken = []
                for _ in range(args.samples):
                    start = time.perf_counter()
                    request.infer([images[0]])
                    taken.append(time.perf_counter() - start)
                row[column] = np.median(taken) * 1e3
        kinds = shares(engine, images[0], args.threads, args.samples)
        total = sum(took for _, took in kinds.values())
        print(f"\n{engine}: {np.median(medians[:, 0]):.2f} ms with f32, {args.threads} thread(s)\n")
        print("| nodes | number | share of their time |\n|---|---|---|")
        for kind, (count, took) in kinds.items():
            print(f"| {kind} | {count} | {took / total:.1%} |")
        faster = float(np.median(medians[:, 0] / medians[:, 1]))
        boxes, scores = float(apart[:, :4].transpose(0, 2, 1)[seen].max(initial=0)), float(apart[:, 4:].max())
        print(
            f"\nbf16 in place of f32: {faster:.2f}x as fast; boxes up to {boxes:.2f} px and scores {scores:.4f} apart"
        )
        answer.append({"engine": str(engine), "faster": faster, "boxes_px": boxes, "scores": scores, "nodes_ms": kinds})
    settings = {**vars(args), "engines": [str(one) for one in args.engines]}
    print(
        json.dumps(
            {"settings": settings, "rows": answer, "device": device_state(), "environment": environment.describe()}
        )
    )


if __name__ == "__main__":
    main()
