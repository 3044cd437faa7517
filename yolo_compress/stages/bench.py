"""Accuracy, latency and size of every engine and of torch, by one accuracy path and one latency path; accuracy of every other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.published import made_for, open_published
from yolo_compress.evaluate.stored_detections import keep, row_name
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.evaluate.torch_latency import spec as torch_spec
from yolo_compress.evaluate.ultralytics_ap import ultralytics_ap
from yolo_compress.progress import bar
from yolo_compress.recipe.recipe import BenchConfig
from yolo_compress.runtime.backends.base import Backend
from yolo_compress.runtime.detect.pre import letterbox, read_image
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.limits import counted
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.latency import percentiles
from yolo_compress.runtime.registry import RUNTIMES
from yolo_compress.stages import Job
from yolo_compress.stages._training import device
from yolo_compress.store.artifact import Artifact, atomic_write
from yolo_compress.train import checkpoint

LATENCY_IMAGES = 8  # real images that the timed calls cycle through


def run(job: Job) -> dict[str, Any]:
    """`metrics["rows"]`: one a model, runtime and precision; raw latencies and detections are kept beside."""
    rows = _with_published(job, _rows(job))
    evaluated = [row for row in rows if row["status"] != "missing"]
    (job.out / "detections").mkdir()
    with bar("bench: mAP", len(evaluated) * len(job.dataset.val), "image") as advance:
        for row in evaluated:
            row |= _accuracy(job, row, advance)
    _latency(job, [row for row in rows if row["status"] == "ok"])
    for row in rows:
        row.pop("open", None)
    return {"rows": rows, "images": len(job.dataset.val), "device": device_state()}


def _rows(job: Job) -> list[dict[str, Any]]:
    """Torch FP32 of both models, then the engines; `open` is the path that a process of its own can open."""
    sources = _sources(job)
    rows = [
        {
            **_row(name, "torch", "fp32", source),
            "open": str(source.file("model.pt")),
            "size_mib": source.file("model.pt").stat().st_size / 2**20,
        }
        for name, source in sources.items()
    ]
    engines = job.inputs["engine"]
    for built in json.loads(engines.file("engines.json").read_text()):
        row = _row(built["model"], built["runtime"], built["precision"], sources[built["model"]], built["source"])
        if built["reason"]:
            row |= {"status": "missing", "reason": built["reason"]}
        else:
            row |= {"open": str(engines.path / built["folder"]), "size_mib": built["size_mib"]}
        rows.append(row)
    return rows


def _with_published(job: Job, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """And one row a file of `export` that no engine here was built from, "untimed": it is evaluated, its speed is not known here."""
    export = job.inputs["export"]
    sources = _sources(job)
    built = {row["file"] for row in rows if row["status"] == "ok"}
    named = {row_name(row): row for row in rows}
    for file in sorted(set(export.manifest.files) - built):
        if target := made_for(file):
            model = file.partition("/")[0]
            row = _row(model, target.runtime, target.precision, sources[model], file)
            reason = named.get(row_name(row), row)["reason"]  # why there is no engine of it, where one was asked for
            named[row_name(row)] = row | {"status": "untimed", "reason": reason, "open": str(export.file(file))}
    return list(named.values())


def _sources(job: Job) -> dict[str, Artifact]:
    return {"original": job.inputs["baseline"], "compressed": job.inputs["distill"]}


def _row(model: str, runtime: str, precision: str, source: Artifact, file: str | None = None) -> dict[str, Any]:
    return {
        "model": model,
        "runtime": runtime,
        "precision": precision,
        "file": file,
        "status": "ok",
        "reason": None,
        "parameters": source.metrics["parameters"],
        "compute_gflops": source.metrics["compute_gflops"],
    }


def _open(job: Job, row: Mapping[str, Any]) -> Backend:
    config: BenchConfig = job.config
    if row["runtime"] == "torch":
        return TorchBackend(_torch(row), job.dataset.names, job.imgsz_hw, device=device(job))
    if row["status"] == "untimed":
        return open_published(Path(row["open"]), row["precision"], job.work)
    return open_engine(row["open"], threads=None if RUNTIMES[row["runtime"]].gpu else config.threads)


def _torch(row: Mapping[str, Any]) -> nn.Module:
    """The torch net as Ultralytics runs it: BatchNorm folded into the convolutions."""
    return checkpoint.load_model(Path(row["open"])).fuse(verbose=False)


def _accuracy(job: Job, row: Mapping[str, Any], advance: Any) -> dict[str, Any]:
    names, samples = job.dataset.names, job.dataset.val
    with _open(job, row) as backend:
        found = accuracy(backend, samples, names, job.imgsz_hw, progress=advance, max_det=job.recipe.data.max_det)
        executed, signature = backend.executed, _signature(backend)
    keep(job.out / "detections" / f"{row_name(row)}.npy", found["detections"], counted(job.recipe.data.max_det))
    return {
        "executed": executed,
        "map50_95": found["map50_95"],
        "map50": found["map50"],
        "per_class": found["per_class"],
        "map50_95_ultralytics": ultralytics_ap(samples, found["detections"], names)["map50_95"],
        "image_set": job.dataset.val_digest,
        "signature": signature,
    }


def _signature(backend: Backend) -> dict[str, Any]:
    """What the network takes and gives: classes, input in px, output of one image."""
    blank_BCHW = np.zeros((backend.batch or 1, backend.channels, *backend.imgsz), np.float32)
    return {"names": list(backend.names), "imgsz": list(backend.imgsz), "output": list(backend(blank_BCHW).shape[1:])}


def _latency(job: Job, rows: list[dict[str, Any]]) -> None:
    """One process an engine, in turn, on real images; percentiles are withheld where n does not carry them."""
    config: BenchConfig = job.config
    inputs = job.work / "inputs.npy"
    batch = job.recipe.export.batch if job.recipe.export else 1
    count = -(-LATENCY_IMAGES // batch) * batch
    images = [letterbox(read_image(s.image), job.imgsz_hw)[0] for s in job.dataset.val[:count]]
    np.save(inputs, np.stack([images[index % len(images)] for index in range(count)]))
    threads = config.threads
    specs = []
    for row in rows:
        options: dict[str, Any] = {
            "label": row_name(row),
            "inputs": str(inputs),
            "warmup_n": config.warmup,
            "batch": batch,
        }
        if row["runtime"] == "torch":
            folder = job.work / row["model"]
            folder.mkdir(exist_ok=True)
            spec = torch_spec(
                _torch(row), job.dataset.names, job.imgsz_hw, folder, device=device(job), threads=threads, **options
            )
        else:
            spec = {**options, "engine": row["open"], "threads": None if RUNTIMES[row["runtime"]].gpu else threads}
        specs.append(spec)
    per_round = -(-config.iterations // config.rounds)
    with bar("bench: latency", len(specs) * config.rounds, "round") as advance:
        results = measure_in_turn(specs, config.rounds, per_round, progress=advance)
    for row, result in zip(rows, results, strict=True):
        samples = result["samples_ms"][: config.iterations]
        row |= percentiles(samples) | {"threads": result["threads"], "latency_quiet": result["quiet"]}
    raw = {spec["label"]: result["rounds_ms"] for spec, result in zip(specs, results, strict=True)}
    atomic_write(job.out / "latency.json", json.dumps(raw) + "\n")
