"""What Q/DQ pairs behind layers that only move values cost on OpenVINO: nodes, outputs and latency, with and without them.

    python benchmarks/openvino_pairs.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --threads 1

PTQ of the given model. The last row is `int8.onnx`, with signed activations: see how far its scores are from the others. Rounds in
turn, one process an engine; ratios are medians over rounds of ratios of medians to FP32. Prints a markdown table, and on the last
line JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from yolo_compress.data.dataset import calibration_subset, load
from yolo_compress.export import qdq
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint

WITH_PAIRS = "openvino, with pairs"


def nodes(engine: Path) -> Counter[str]:
    """Return the number of nodes of the compiled graph, by type and precision."""
    compiled = openvino.Core().compile_model(str(engine / "engine.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    return Counter(f"{info['layerType'].get()} {info['runtimePrecision'].get()}" for info in infos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--samples", type=int, default=30)
    args = parser.parse_args()
    size, dataset = (args.imgsz, args.imgsz), load(args.data)
    model = checkpoint.load_model(find_weights(args.weights))
    state = fold(ptq(model, partial(letterboxed, calibration_subset(dataset.train, 32, 0), size)), model)
    qdq.FORMS[WITH_PAIRS] = qdq.FORMS["openvino"]._replace(form=WITH_PAIRS, forwarding_pairs=True)
    images = [batch.numpy() for batch in letterboxed(dataset.val[:16], size, batch=1)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        floats, engines = Path(scratch, "fp32.onnx"), {"FP32": Path(scratch, "fp32")}
        export_onnx(model, floats, size, names=dataset.names)
        BACKENDS["openvino"].build(floats, engines["FP32"], "fp32")
        for form in (WITH_PAIRS, "openvino", "tensorrt10"):
            file, engines[form] = Path(scratch, f"{form}.onnx"), Path(scratch, form)
            qdq.insert_qdq(floats, file, state, form)
            BACKENDS["openvino"].build(file, engines[form], "int8")
        outputs = {}
        for name, engine in engines.items():
            with open_engine(engine, threads=1) as backend:
                outputs[name] = np.concatenate([backend(image) for image in images])
        specs: list[Any] = [{"label": n, "engine": str(e), "threads": args.threads} for n, e in engines.items()]
        taken = measure_in_turn(specs, args.rounds, args.samples)
        medians = np.array([[np.median(one) for one in each["rounds_ms"]] for each in taken])
        for index, (name, engine) in enumerate(engines.items()):
            found, apart = nodes(engine), np.abs(outputs[name] - outputs[WITH_PAIRS])[:, 4:].max()
            subgraphs = sum(count for kind, count in found.items() if kind.startswith("Subgraph"))
            rows.append({
                "form": name, "nodes": sum(found.values()), "subgraphs": subgraphs, "score_apart": float(apart),
                "p50_ms": float(np.median(medians[index])), "faster": float(np.median(medians[0] / medians[index])),
                "quiet": taken[index]["quiet"],
            })  # fmt: skip
    described = environment.describe()
    print(f"{args.weights}, {args.imgsz} px, threads {args.threads}; {described['cpu']}, {device_state()}\n")
    print(
        "| form | nodes | subgraphs | largest score difference from the first INT8 row | ms | faster | quiet |\n|"
        + "---|" * 7
    )
    for row in rows:
        print(f"| {row['form']} | {row['nodes']} | {row['subgraphs']} | {row['score_apart']:.4f} | {row['p50_ms']:.2f} "
              f"| {row['faster']:.2f}x | {row['quiet']} |")  # fmt: skip
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
