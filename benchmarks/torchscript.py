"""INT8 TorchScript (PTQ) beside the float one and the INT8 form of ONNX Runtime: mAP, detections, and latency in turn.

    python benchmarks/torchscript.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --threads 1

A row each engine of torch's quantised convolutions. Detections from score 0.25 on against those of the ONNX graph as it is written
(optimisations off): boxes without a partner at IoU 0.5, and how far apart nine of ten pairs are at most. Latency: one process,
rounds in turn, median over rounds of the median, and of the ratio to the float TorchScript of the same round. Prints a markdown
table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from yolo_compress.data.dataset import calibration_subset, load
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.float_onnx import export_onnx, export_torchscript
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.export.torchscript import export_int8_torchscript
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.golden import difference
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint

CONF = 0.25
FLOAT, AS_WRITTEN = "TorchScript, float", "ONNX Runtime, INT8, as written"


class Session(nn.Module):
    """ONNX Runtime behind the interface of a module, so that every row is measured alike."""

    def __init__(self, file: Path, optimise: bool, threads: int) -> None:
        super().__init__()
        options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
        options.intra_op_num_threads = threads
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.eval()

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images_BCHW.numpy()})[0])


def packed_for(engine: str, file: Path) -> nn.Module:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        return torch.jit.load(str(file))
    finally:
        torch.backends.quantized.engine = before


def modules(folder: Path, args: argparse.Namespace, images: Any) -> dict[str, nn.Module]:
    """Name of the row -> what is run."""
    size, model = (args.imgsz, args.imgsz), checkpoint.load_model(find_weights(args.weights))
    names = tuple(model.names.values())
    state = fold(ptq(model, partial(letterboxed, images, size), args.calibrator), model)
    export_onnx(model, folder / "fp32.onnx", size, names=names)
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", state, "onnxruntime")
    export_torchscript(model, folder / "fp32.torchscript", size, names=names)
    export_int8_torchscript(model, folder / "int8.torchscript", size, state, names=names)
    for file in ("fp32.torchscript", "int8.torchscript"):
        print(f"{file}: {(folder / file).stat().st_size / 2**20:.2f} MiB")
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    return {
        FLOAT: torch.jit.load(str(folder / "fp32.torchscript")),
        **{f"TorchScript, INT8, {engine}": packed_for(engine, folder / "int8.torchscript") for engine in engines},
        "ONNX Runtime, float": Session(folder / "fp32.onnx", True, args.threads),
        "ONNX Runtime, INT8": Session(folder / "int8.onnx", True, args.threads),
        AS_WRITTEN: Session(folder / "int8.onnx", False, args.threads),
    }


def rounds_ms(backends: dict[str, TorchBackend], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Medians of the rounds, in turn."""
    image = np.random.default_rng(0).random((1, 3, args.imgsz, args.imgsz), np.float32)
    calls = {name: backend.bind(image) for name, backend in backends.items()}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            call()
            taken = []
            for _ in range(args.samples):
                start = time.perf_counter()
                call()
                taken.append(1000 * (time.perf_counter() - start))
            medians[name].append(float(np.median(taken)))
    return {name: np.array(values) for name, values in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--calib-images", type=int, default=128)
    parser.add_argument("--calibrator", default="mse")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=20)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    dataset, size = load(args.data), (args.imgsz, args.imgsz)
    images = calibration_subset(dataset.train, args.calib_images, 0)
    with tempfile.TemporaryDirectory() as scratch:
        backends = {
            name: TorchBackend(module, dataset.names, size, threads=args.threads)
            for name, module in modules(Path(scratch), args, images).items()
        }
        for backend in backends.values():
            backend.batch = 1
        found = {name: accuracy(backend, dataset.val, dataset.names, size) for name, backend in backends.items()}
        ms = rounds_ms(backends, args)
    described = environment.describe()
    print(
        f"{args.weights}, {args.imgsz} px, {len(images)} calibration images, mAP over {len(dataset.val)} images; "
        f"{args.threads} threads, n = {args.rounds} rounds of {args.samples}; {described['cpu']}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {device_state()}, torch {torch.__version__}, commit {described['commit']}\n"
    )
    print("| | mAP50-95 | without partner | score | box px | ms | faster |\n|---|---|---|---|---|---|---|")
    rows = []
    for name, result in found.items():
        apart = difference(found[AS_WRITTEN]["detections"], result["detections"], CONF)
        faster = float(np.median(ms[FLOAT] / ms[name]))
        row = {"row": name, "map50_95": result["map50_95"], **apart._asdict(), "p50_ms": float(np.median(ms[name]))}
        rows.append({**row, "faster": faster})
        print(
            f"| {name} | {row['map50_95']:.4f} | {apart.unmatched} of {apart.compared} | {apart.most_score:.3f} "
            f"| {apart.most_box_px:.1f} | {row['p50_ms']:.2f} | {faster:.2f}x |"
        )
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
