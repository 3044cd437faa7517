"""DFL as Ultralytics exports it (a convolution of a softmax) against `nets.detect.Expectation`, in turn, on both runtimes.

    python benchmarks/dfl.py --anchors 2100      # 2100: YOLOv8 at 320 px; 8400: at 640

Median microseconds of one call and the largest difference of the outputs. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.nn.modules import DFL

from yolo_compress import environment
from yolo_compress.nets.detect import Expectation


def opened(file: Path, threads: int, x: np.ndarray) -> dict[str, tuple[Callable[[], Any], Callable[[], np.ndarray]]]:
    """Runtime -> (timed call, output)."""
    import onnxruntime
    import openvino

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(file), "CPU", config).create_infer_request()
    request.infer([x])
    return {
        "onnxruntime": (lambda: session.run(None, {"x": x}), lambda: session.run(None, {"x": x})[0]),
        "openvino": (request.infer, lambda: np.array(request.get_output_tensor(0).data)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=2100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=100)
    args = parser.parse_args()
    x = torch.randn(1, 64, args.anchors, generator=torch.Generator().manual_seed(0))
    forms = {"ultralytics": DFL(16), "expectation": Expectation(16)}
    calls = {}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module in forms.items():
            file = Path(scratch) / f"{name}.onnx"
            torch.onnx.export(module.eval(), (x,), str(file), opset_version=17, dynamo=False, input_names=["x"])
            calls[name] = opened(file, args.threads, x.numpy())
    rows = {}
    for runtime in ("onnxruntime", "openvino"):
        samples: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(args.rounds):
            for name in forms:
                call = calls[name][runtime][0]
                call()
                for _ in range(args.samples):
                    start = time.perf_counter()
                    call()
                    samples[name].append(time.perf_counter() - start)
        old, new = (1e6 * float(np.median(samples[name])) for name in forms)
        difference = float(np.abs(calls["ultralytics"][runtime][1]() - calls["expectation"][runtime][1]()).max())
        rows[runtime] = {"ultralytics_us": old, "expectation_us": new, "ratio": new / old, "max_difference": difference}
    print("| runtime | Ultralytics us | Expectation us | ratio | largest difference |\n|---|---|---|---|---|")
    for runtime, row in rows.items():
        print(f"| {runtime} | {row['ultralytics_us']:.0f} | {row['expectation_us']:.0f} | {row['ratio']:.3f} "
              f"| {row['max_difference']:.1e} |")  # fmt: skip
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
