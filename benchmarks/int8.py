"""INT8 without training: our placement against NNCF's and ONNX Runtime's own PTQ; mAP and latency of each, in turn.

    pip install nncf
    python benchmarks/int8.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320

All calibrate on the same letterboxed training images. NNCF: `nncf.quantize` of the OpenVINO model. ONNX Runtime:
`quantize_static`, Q/DQ, UINT8 activations, INT8 weights an output channel in 7 bits (`reduce_range`). Both leave the decoding of
boxes in float, as Ultralytics' own export does: boxes and scores leave in one tensor, which one scale cannot serve. The drop is
against the float net on the same runtime, with its 90 % interval over resamplings of the validation images (paired). Latency: one
process an engine, rounds in turn, median over rounds of the ratio to that float net. `--int8 NAME=FOLDER` adds the files of an
`export`. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from yolo_compress.data.dataset import Sample, calibration_subset, load
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.coco import mean_ap
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime.backends.base import load_info, save_info
from yolo_compress.runtime.backends.openvino import ENGINE_FILE, WEIGHTS_FILE
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint

DECODE = r"/model\.22/(?!cv[23])"  # nodes of Detect behind its convolutions
OURS = {"openvino": "int8-openvino.onnx", "onnxruntime": "int8-onnxruntime.onnx"}  # as `export` names them


def ours(folder: Path, images: Sequence[Sample], args: argparse.Namespace) -> None:
    size = (args.imgsz, args.imgsz)
    model = checkpoint.load_model(find_weights(args.weights))
    export_onnx(model, folder / "fp32.onnx", size, names=tuple(model.names.values()))
    state = fold(ptq(model, partial(letterboxed, images, size), args.calibrator), model)
    for runtime, file in OURS.items():
        insert_qdq(folder / "fp32.onnx", folder / file, state, runtime)


def nncf_ptq(folder: Path, images: Sequence[Sample], args: argparse.Namespace) -> Path:
    """An engine directory with what NNCF makes of the float IR."""
    import nncf
    import openvino

    engine = folder / "nncf"
    BACKENDS["openvino"].build(folder / "fp32.onnx", engine, "fp32")
    info = load_info(engine)
    model = openvino.Core().read_model(str(folder / "fp32.onnx"))
    shown = [batch.numpy() for batch in letterboxed(images, (args.imgsz, args.imgsz), batch=1)]
    ignored = nncf.IgnoredScope(patterns=[f"{DECODE}.*"], validate=False)
    quantised = nncf.quantize(model, nncf.Dataset(shown), subset_size=len(shown), ignored_scope=ignored)
    openvino.save_model(quantised, str(engine / ENGINE_FILE), compress_to_fp16=False)
    save_info(replace(info, precision="int8"), engine, [ENGINE_FILE, WEIGHTS_FILE])
    return engine


def ort_ptq(folder: Path, images: Sequence[Sample], args: argparse.Namespace) -> Path:
    """ONNX Runtime's static quantisation as its documentation sets it up for x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Any] = letterboxed(images, (args.imgsz, args.imgsz), batch=1)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.numpy()}

    quant_pre_process(str(folder / "fp32.onnx"), str(folder / "prepared.onnx"))
    quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / "ort.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        nodes_to_exclude=[
            node.name for node in onnx.load(folder / "prepared.onnx").graph.node if re.match(DECODE, node.name)
        ],
    )
    engine = folder / "ort"
    names, size = tuple(checkpoint.load_model(find_weights(args.weights)).names.values()), (args.imgsz, args.imgsz)
    BACKENDS["onnxruntime"].build(folder / "ort.onnx", engine, "int8", names=names, imgsz=size)
    return engine


def drop_interval(
    samples: Sequence[Sample], names: Sequence[str], of: Sequence[Any], minus: Sequence[Any], n: int
) -> Any:
    """5 and 95 % points of mAP50-95(of) - mAP50-95(minus) over `n` resamplings of the images, the same for both."""

    def score(found: Sequence[Any], chosen: np.ndarray) -> float:
        return float(mean_ap([samples[i] for i in chosen], [found[i] for i in chosen], names)["map50_95"])

    draws = np.random.default_rng(0).integers(0, len(samples), (n, len(samples)))
    drops = [score(of, chosen) - score(minus, chosen) for chosen in draws if any(samples[i].boxes for i in chosen)]
    return [round(float(point), 4) for point in np.percentile(drops, [5, 95])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--calib-images", type=int, default=128)
    parser.add_argument("--calibrator", default="mse")
    parser.add_argument("--int8", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--without", nargs="*", default=[], choices=["nncf", "ort"])
    parser.add_argument("--resamplings", type=int, default=60)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--images", type=int, help="validation images; default: all")
    args = parser.parse_args()
    size = (args.imgsz, args.imgsz)
    dataset = load(args.data)
    val = dataset.val[: args.images]
    images = calibration_subset(dataset.train, args.calib_images, 0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ours(folder, images, args)
        engines: dict[tuple[str, str], Path] = {}
        for runtime, file in OURS.items():
            for name, source, precision in (
                ("float", folder / "fp32.onnx", "fp32"),
                ("ours, PTQ", folder / file, "int8"),
            ):
                engines[runtime, name] = folder / f"{runtime}-{name}"
                BACKENDS[runtime].build(source, engines[runtime, name], precision)
            for text in args.int8:
                name, _, where = text.partition("=")
                engines[runtime, name] = folder / f"{runtime}-{name}"
                BACKENDS[runtime].build(Path(where) / file, engines[runtime, name], "int8")
        if "nncf" not in args.without:
            engines["openvino", "NNCF, PTQ"] = nncf_ptq(folder, images, args)
        if "ort" not in args.without:
            engines["onnxruntime", "ONNX Runtime, PTQ"] = ort_ptq(folder, images, args)
        for (runtime, name), engine in engines.items():
            with open_engine(engine, threads=args.threads) as backend:
                result = accuracy(backend, val, dataset.names, size)
            rows.append({"runtime": runtime, "network": name, **result})
        for runtime in OURS:
            mine = [row for row in rows if row["runtime"] == runtime]
            specs = [
                {"label": row["network"], "engine": str(engines[runtime, row["network"]]), "threads": args.threads}
                for row in mine
            ]
            rounds = [taken["rounds_ms"] for taken in measure_in_turn(specs, args.rounds, args.samples)]
            medians = np.array([[np.median(one) for one in taken] for taken in rounds])
            for row, ms, ratio in zip(mine, np.median(medians, 1), np.median(medians[0] / medians, 1), strict=True):
                row |= {"p50_ms": float(ms), "faster": float(ratio)}
                row["drop"] = mine[0]["map50_95"] - row["map50_95"]
                found = (mine[0]["detections"], row["detections"])
                row["drop_interval"] = drop_interval(val, dataset.names, *found, args.resamplings)
    described = environment.describe()
    print(
        f"{args.weights}, {args.imgsz} px, {len(images)} calibration images, mAP over {len(val)} images; n = {args.rounds} rounds of "
        f"{args.samples}; {described['cpu']}, {described['cores']} cores, {device_state()}, commit {described['commit']}\n"
    )
    print("| runtime | network | mAP50-95 | drop (90 %) | ms | faster | convolutions |\n|---|---|---|---|---|---|---|")
    for row in rows:
        row.pop("detections")
        low, high = row["drop_interval"]
        print(
            f"| {row['runtime']} | {row['network']} | {row['map50_95']:.4f} | {row['drop']:+.4f} ({low:+.4f} to {high:+.4f}) "
            f"| {row['p50_ms']:.2f} | {row['faster']:.2f}x | {row['executed']} |"
        )
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
