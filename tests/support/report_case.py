"""A report with content in every section, made by hand, for the tests of HTML, Markdown and JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from yolo_compress.report.bench_rows import with_ids
from yolo_compress.report.charts.gallery import Item
from yolo_compress.report.document import Findings, build, unknown_data
from yolo_compress.report.schema import Document

EVIL = "<script>alert(1)</script>"
IMAGES = "a1" * 32
HINT = "TensorRT does not import here; pip install tensorrt"


def row(model: str, runtime: str, precision: str, map50_95: float, **changes: Any) -> dict[str, Any]:
    latency = {"original": 20.0, "compressed": 8.0}[model]
    base = {
        "model": model,
        "runtime": runtime,
        "precision": precision,
        "status": "ok",
        "reason": None,
        "executed": precision,
        "map50_95": map50_95,
        "map50": 0.9,
        "map50_95_ultralytics": map50_95 - 0.001,
        "latency_p50_ms": latency,
        "latency_p90_ms": latency + 1,
        "latency_p99_ms": latency + 3,
        "latency_n": 1000,
        "size_mib": 12.0 if model == "original" else 3.0,
        "parameters": 3_000_000,
        "compute_gflops": 2.0,
        "image_set": IMAGES,
        "signature": {"names": ["cell"], "imgsz": [320, 320], "output": [5, 2100]},
    }
    return {**base, **changes}


def missing(model: str, precision: str, runtime: str = "tensorrt") -> dict[str, Any]:
    return {"model": model, "runtime": runtime, "precision": precision, "status": "missing", "reason": HINT}


def untimed(map50_95: float, **changes: Any) -> dict[str, Any]:
    """Return the row of an INT8 file without an engine on this machine."""
    base = row("compressed", "tensorrt11", "int8", map50_95)
    file = {"file": "compressed/int8-tensorrt11.onnx", "executed": "simulated, int8-tensorrt11.onnx node by node"}
    known = {key: value for key, value in base.items() if not key.startswith("latency_") and key != "size_mib"}
    return {**known, "status": "untimed", **file, **changes}


def stage(name: str, map50_95: float | None, **changes: Any) -> dict[str, Any]:
    base = {
        "stage": name,
        "fingerprint": name * 8,
        "status": "built",
        "parameters": 3_000_000,
        "compute_gflops": 2.0,
        "size_mib": 6.0,
        "map50_95": map50_95,
        "map50": 0.9,
        "seconds": 75.0,
        "epochs": 5,
        "image_set": IMAGES,
    }
    return {**base, **changes}


def rows(value: float = 0.59, reference: float = 0.6) -> list[dict[str, Any]]:
    return [
        row("original", "torch", "fp32", reference),
        row("original", "openvino", "fp32", reference),
        row("compressed", "openvino", "fp32", 0.6),
        row("compressed", "openvino", "int8", value),
        missing("original", "int8"),
        missing("compressed", "int8"),
    ]


def built(bench: list[dict[str, Any]], min_retention: float = 0.9, **findings: Any) -> Document:
    """Return a document with these bench rows and `findings` only. `data` and `reproduce` may be incomplete."""
    if "data" in findings:
        findings["data"] = {**unknown_data(), **findings["data"]}
    if "reproduce" in findings:
        findings["reproduce"] = {"recipe_yaml": None, "command": None, **findings["reproduce"]}
    return build(Findings(**{"recipe": "x", **findings}, rows=with_ids(bench), min_retention=min_retention))


def document(bench: list[dict[str, Any]] | None = None, min_retention: float = 0.98, **changes: Any) -> Document:
    findings: dict[str, Any] = {
        "recipe": "bccd",
        "chain": [stage("baseline", 0.6), stage("prune", 0.55)],
        "data": {"yaml": "bccd.yaml", "val_images": 87},
        "gammas": {"edges": [0.0, 0.1, 0.5, 1.0], "epochs": [[1, 5, 9], [6, 4, 5]]},
        "channels": {"model.10.conv": [64, 40], "model.2.cv1": [32, 32]},
    }
    return built(rows() if bench is None else bench, min_retention, **{**findings, **changes})


def item(name: str = "a.jpg", names: tuple[str, ...] = ("cell",), **changes: Any) -> Item:
    made = Item(
        image=np.full((96, 128, 3), 90, np.uint8),
        truths=[(0, 0.5, 0.5, 0.25, 0.5), (0, 0.1, 0.1, 0.1, 0.1)],
        detections_a=np.array([[48, 24, 80, 72, 0.9, 0], [0, 80, 9, 90, 0.1, 0]], float),
        detections_b=np.array([[49, 24, 80, 72, 0.8, 0], [100, 60, 120, 90, 0.5, 0]], float),
        names=names,
        name=name,
    )
    return replace(made, **changes)


def ab(names: tuple[str, ...] = ("cell", "<script>alert(1)</script>"), **changes: Any) -> dict[str, Any]:
    """Return an A/B document (schema 1) in which the second class is certainly worse, and a third has no objects."""

    def part(name: str, truths: int, a: float | None, delta: float = 0.0, reach: float = 0.01) -> dict[str, Any]:
        if a is None:
            return {"name": name, "truths": truths} | dict.fromkeys(("a", "b", "delta", "low", "high"))
        ends = {"delta": delta, "low": delta - reach, "high": delta + reach}
        return {"name": name, "truths": truths, "a": a, "b": a + delta, **ends}

    def total(a: float, delta: float) -> dict[str, Any]:
        ends = {"interval_a": [a - 0.02, a + 0.02], "interval_b": [a + delta - 0.02, a + delta + 0.02]}
        return {key: value for key, value in part("", 0, a, delta).items() if key not in ("name", "truths")} | ends

    side = {"recall": 0.9, "missed": 12, "false_positives": 30, "false_positives_per_image": 0.345}
    base = {
        "schema": 1,
        "a": {"label": "baseline, FP32 on PyTorch"},
        "b": {"label": "compressed, INT8 on OpenVINO"},
        "images": 87,
        "image_set": IMAGES,
        "classes": list(names),
        "settings": {"margin": 0.01, "conf": 0.3, "replicates": 1000, "seed": 0, "iou": 0.5},
        "verdict": {
            "status": "inconclusive",
            "line": "INCONCLUSIVE: these images cannot show whether mAP50-95 of B is more than 1 % below that of A: 0.600 -> 0.590",
            "smallest_difference": 0.01,
        },
        "map50_95": total(0.6, -0.01),
        "map50": total(0.9, 0.002),
        "by_class": [part(names[0], 90, 0.7, 0.005), part(names[1], 30, 0.5, -0.04), part("none of it", 0, None)],
        "by_size": [part("small", 100, 0.5), part("medium", 20, 0.7), part("large", 0, None)],
        "operating": {
            "conf": 0.3,
            "a": side,
            "b": {**side, "missed": 15, "recall": 0.875},
            "mcnemar": {"a_only": 5, "b_only": 2, "images": 7, "p": 0.453},
            "threshold_b": 0.25,
            "score_shift": {"median": -0.02, "p10": -0.1, "p90": 0.03},
            "agreement": {"matched": 105, "median_iou": 0.95, "p05_iou": 0.8},
        },
        "flips": [
            {"image": 3, "lost": 2, "gained": 0, "new_false_positives": 4},
            {"image": 1, "lost": 2, "gained": 1, "new_false_positives": 0},
            {"image": 2, "lost": 0, "gained": 1, "new_false_positives": 1},
            {"image": 5, "lost": 3, "gained": 3, "new_false_positives": 0},
        ],
        "pr": {"a": [1 - i / 100 for i in range(101)], "b": [1 - i / 120 for i in range(101)]},
        "latency": {"a_p50_ms": 20.0, "b_p50_ms": 8.0, "ratio": 2.5, "low": 2.4, "high": 2.6},
    }
    return {**base, **changes}


def errors() -> dict[str, Any]:
    """Return the TIDE errors of both models on three images."""
    from yolo_compress.evaluate import tide

    truths = [np.array([[0, 0, 0, 10, 10], [0, 20, 0, 30, 10]], float)] * 3
    a = [np.array([[0, 0, 10, 10, 0.9, 0], [20, 0, 30, 10, 0.2, 1]], float)] * 3
    b = [np.array([[0, 0, 10, 10, 0.9, 0], [60, 0, 70, 10, 0.95, 0]], float)] * 3
    found = {"a": tide.errors(truths, a), "b": tide.errors(truths, b)}
    shown = {
        f"shown_{key}": tide.errors(truths, [m[m[:, 4] >= 0.25] for m in model]) for key, model in (("a", a), ("b", b))
    }
    return {"conf": 0.25, **found, **shown}


QUANTISATION = {
    "measure": "loss",
    "float": 2.0,
    "int8": 2.2,
    "worst": 2.05,
    "then": 2.04,
    "left": ["model.4.cv2"],
    "images": 64,
    "groups": {"images": 2.21, "model.4.cv2": 2.04, "model.10.cv1": 2.2},
    "price": "openvino",
    "compute_gflops": {"images": 0.5, "model.4.cv2": 0.25, "model.10.cv1": 1.0},
    "price_ms": {"images": 0.001, "model.4.cv2": 0.125, "model.10.cv1": 0.75},
}
PLACEMENT = [
    {"tensor": "images", "precision": "int8", "group": "images", "why": "read by 1 convolution"},
    {"tensor": "model.4.cv2", "precision": "float", "group": "model.4.cv2", "why": "left in float as asked"},
    {
        "tensor": "model.22.cv2.0.1",
        "precision": "float",
        "group": "model.22.cv2.0.1",
        "why": "read by model.22.cv2.0.2 alone",
    },
    {
        "tensor": "model.22.cv3.0.1",
        "precision": "float",
        "group": "model.22.cv3.0.1",
        "why": "read by model.22.cv3.0.2 alone",
    },
]


def whole(**changes: Any) -> Document:
    """Return a document with all sections."""
    bench = rows()
    for line in bench[:4]:
        line.update(map50_95_low=line["map50_95"] - 0.03, map50_95_high=line["map50_95"] + 0.03)
    quantiles = {
        f"{m}-openvino-{p}": [1 + i / 10 for i in range(101)] for m, p in (("original", "fp32"), ("compressed", "int8"))
    }
    sections: dict[str, Any] = {
        "ab": ab(),
        "errors": errors(),
        "latency_quantiles": quantiles,
        "quantisation": QUANTISATION,
        "placement": PLACEMENT,
        "flops": {"model.2.cv1.conv": [2_000_000, 1_000_000]},
        "recovery": [(1, 0.5), (2, 0.55)],
        "environment": {"device": {"cpu": "some CPU"}, "versions": {"torch": "2", "onnx": "1"}},
        "reproduce": {"recipe_yaml": "data:\n  yaml: bccd.yaml\n", "command": "make all"},
        "not_tested": ["Nothing ran on TensorRT."],
    }
    return document(changes.pop("rows", bench), **{**sections, **changes})


def device(**changes: Any) -> dict[str, Any]:
    """Return a device.json, as `bench.py` of a bundle writes it on a robot."""
    row = {
        "model": "compressed", "runtime": "tensorrt", "precision": "int8", "executed": "int8", "map50_95": 0.588, "map50": 0.9,
        "images": 87, "image_set": IMAGES, "latency_p50_ms": 2.0, "latency_p90_ms": 2.1, "latency_p99_ms": 2.4, "latency_n": 1000,
        "end_to_end_p50_ms": 6.5, "fps": 150.0, "memory_mib": 310, "power_w": 7.5, "idle_w": 3.0, "energy_mj_per_frame": 50.0,
        "status": "ok", "reason": None,
    }  # fmt: skip
    timed_only = {**row, "precision": "fp16", "map50_95": None, "map50": None, "image_set": None, "latency_p50_ms": 3.0}
    base = {
        "schema": 1,
        "bundle": {"name": "bccd", "version": 3, "manifest_sha256": "d4" * 32},
        "device": {
            "board": "NVIDIA Jetson Orin Nano",
            "nvpmodel": "15W",
            "cpu": "ARM",
            "clocks": {"gpu_hz": 1020000000},
        },
        "runtime": "tensorrt",
        "library": "10.3.0",
        "rows": [row, timed_only],
        "golden": {"passed": True, "worst_box_px": 0.12, "worst_score": 0.0004},
    }
    return {**base, **changes}


def cascade(**changes: Any) -> dict[str, Any]:
    """A `cascade.json`."""
    model = {"label": "a", "executed": "fp32", "imgsz": [192, 192], "onnx_sha256": "1" * 64, "precision": "fp32",
             "map50_95": 0.5, "mean_ms": 2.0, "p50_ms": 2.0, "p99_ms": 2.5}  # fmt: skip
    own = {"threshold": 0.1, "kept": 0.625, "map50_95": 0.58, "mean_ms": 6.0, "p50_ms": 2.1, "p99_ms": 12.7, "kept_ms": 2.1,
           "handed_ms": 12.5, "timed_images": 64, "expected_kept": 0.6}  # fmt: skip
    return {
        "schema": 1,
        "small": model,
        "large": {**model, "onnx_sha256": "2" * 64, "imgsz": [320, 320], "map50_95": 0.6, "mean_ms": 10.0},
        "static": None,
        "names": ["RBC", "WBC"],
        "image_set": IMAGES,
        "images": 87,
        "demand": {"latency_ms": None, "max_drop": None},
        "router": {"features": ["shown"], "weights": [1.0], "bias": 0.0, "penalty": None, "explained": 0.2, "images": 205,
                   "gain": 0.1},
        "cascade": own,
        "control": {"label": "small with large", "map50_95": 0.55},
        "verdict": {"status": "pass", "line": f"PASS: use the cascade {EVIL}", "instead": "small", "delta": 0.03, "low": 0.01,
                    "high": 0.05, "met": None},
        "quiet": True,
        **changes,
    }  # fmt: skip
