"""Stage `bench`: measure accuracy, latency and size of both models in torch and as engines.

Exported files without an engine get only an accuracy. The same code measures the accuracy of all rows, and the latency of all timed
rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch
from torch import nn

from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.exported_files import made_for, open_exported
from yolo_compress.evaluate.latency_inputs import write_inputs
from yolo_compress.evaluate.rows import (
    Accuracy,
    BenchRow,
    Latency,
    Model,
    Precision,
    Signature,
    Subject,
    engine_rows,
)
from yolo_compress.evaluate.stored_detections import keep, row_name
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.evaluate.torch_latency import TorchSpec
from yolo_compress.evaluate.torch_latency import spec as torch_spec
from yolo_compress.evaluate.ultralytics_ap import ultralytics_ap
from yolo_compress.files.atomic import atomic_write
from yolo_compress.nets import detect
from yolo_compress.progress import bar
from yolo_compress.recipe.recipe import BenchConfig
from yolo_compress.report.schema import Status
from yolo_compress.runtime.backends.base import Backend
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.max_detections import counted
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.latency import percentiles
from yolo_compress.runtime.measure.messages import Spec
from yolo_compress.runtime.registry import OWN_FILE, RUNTIMES
from yolo_compress.stages import Job
from yolo_compress.stages._training import device
from yolo_compress.stages.metrics import BenchMetrics, of_model
from yolo_compress.store.manifest import Artifact
from yolo_compress.train import checkpoint


class _Gpu(TypedDict, total=False):
    gpu: str  # as in `Subject`


@dataclass(frozen=True)
class _Candidate:
    """A model, engine or file that is to be measured: a row of the bench table before its measurement.

    Attributes:
        subject: Model, runtime and precision.
        status: Status of the row after the measurement.
        path: Model, engine or file that another process can open. None: the row is missing.
        size_mib: Size of the engine. None: the engine is not timed.
    """

    subject: Subject
    status: Status = "ok"
    path: str | None = None
    size_mib: float | None = None

    @property
    def name(self) -> str:
        """Name of the row, from model, runtime and precision; see `row_name`."""
        return row_name(self.subject)


def run(job: Job) -> BenchMetrics:
    """Measure each model in each runtime and precision, and return the rows. Write the latency of each call and the detections."""
    candidates = _with_exported_files(job, _candidates(job))
    evaluated = [one for one in candidates if one.status != "missing"]
    (job.out / "detections").mkdir()
    with bar("bench: mAP", len(evaluated) * len(job.dataset.val), "image") as advance:
        accuracies = {one.name: _accuracy(job, one, advance) for one in evaluated}
    latencies = _latency(job, [one for one in candidates if one.status == "ok"])
    rows = [_row(one, accuracies.get(one.name), latencies.get(one.name)) for one in candidates]
    return {"rows": rows, "images": len(job.dataset.val), "device": device_state()}


def _row(candidate: _Candidate, found: Accuracy | None, latency: Latency | None) -> BenchRow:
    """Return the bench row of a candidate, with its accuracy and latency if they were measured."""
    if found is None:
        return {**candidate.subject, "status": "missing"}
    if latency is None or candidate.size_mib is None:
        return {**candidate.subject, **found, "status": "untimed"}
    return {**candidate.subject, **found, **latency, "status": "ok", "size_mib": candidate.size_mib}


def _candidates(job: Job) -> list[_Candidate]:
    """Return what has to be measured: both models in torch FP32, then all engines."""
    sources, where = _sources(job), device(job)
    gpu: _Gpu = {} if where == "cpu" else {"gpu": torch.cuda.get_device_name(where)}
    found = [
        _Candidate(
            {**_subject(name, "torch", "fp32", source), **gpu},
            path=str(source.file("model.pt")),
            size_mib=source.file("model.pt").stat().st_size / 2**20,
        )
        for name, source in sources.items()
    ]
    engines = job.inputs["engine"]
    for built in engine_rows(engines):
        model = built["model"]
        subject = _subject(model, built["runtime"], built["precision"], sources[model], built["source"])
        if "choice" in built:
            subject["choice"] = built["choice"]
        if built["reason"]:
            subject["reason"] = built["reason"]
            found.append(_Candidate(subject, "missing"))
        else:
            found.append(_Candidate(subject, "ok", str(engines.path / built["folder"]), built["size_mib"]))
    return found


def _with_exported_files(job: Job, candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the candidates with the files of `export` added that no engine here was built from. They are not timed.

    For an INT8 file only an engine of the runtime that the file is made for counts, because another runtime computes other parts of
    the graph in INT8: NCNN takes TensorRT's file and quantises only convolutions.
    """
    export = job.inputs["export"]
    sources = _sources(job)
    built = {(one.subject["file"], one.subject["runtime"]) for one in candidates if one.status == "ok"}
    files = {file for file, _ in built}
    named = {one.name: one for one in candidates}
    for file in sorted(export.manifest.files):
        target = made_for(file)
        if target and ((file, target.runtime) not in built if target.precision == "int8" else file not in files):
            model = cast(Model, file.partition("/")[0])
            subject = _subject(model, target.runtime, target.precision, sources[model], file)
            if other := named.get(row_name(subject)):
                if other.status == "ok":  # the engine here was built from a file that suits this processor better
                    subject["runtime"] += OWN_FILE
                subject["reason"] = other.subject["reason"]  # why the engine could not be built
            named[row_name(subject)] = _Candidate(subject, "untimed", str(export.file(file)))
    return list(named.values())


def _sources(job: Job) -> dict[Model, Artifact]:
    return {"original": job.inputs["baseline"], "compressed": job.inputs["distill"]}


def _subject(model: Model, runtime: str, precision: Precision, source: Artifact, file: str | None = None) -> Subject:
    metrics = of_model(source)
    return {
        "model": model,
        "runtime": runtime,
        "precision": precision,
        "file": file,
        "reason": None,
        "parameters": metrics["parameters"],
        "compute_gflops": metrics["compute_gflops"],
    }


def _open(job: Job, candidate: _Candidate) -> Backend:
    config: BenchConfig = job.config
    subject, path = candidate.subject, str(candidate.path)
    if subject["runtime"] == "torch":
        return TorchBackend(_torch(path), job.dataset.names, job.imgsz_hw, device=device(job))
    if candidate.status == "untimed":
        return open_exported(Path(path), subject["precision"], job.work)
    return open_engine(path, threads=config.threads if RUNTIMES[subject["runtime"]].takes_threads else None)


def _torch(path: str) -> nn.Module:
    """Load a torch model and fold BatchNorm into the convolutions, as Ultralytics does for inference."""
    return cast(nn.Module, detect.fuse(checkpoint.load_model(Path(path))))


def _accuracy(job: Job, candidate: _Candidate, advance: Callable[[int], None]) -> Accuracy:
    names, samples = job.dataset.names, job.dataset.val
    with _open(job, candidate) as backend:
        found = accuracy(backend, samples, names, job.imgsz_hw, progress=advance, max_det=job.recipe.data.max_det)
        executed, signature = backend.executed, _signature(backend)
    keep(job.out / "detections" / f"{candidate.name}.npy", found["detections"], counted(job.recipe.data.max_det))
    return {
        "executed": executed,
        "map50_95": found["map50_95"],
        "map50": found["map50"],
        "per_class": found["per_class"],
        "map50_95_ultralytics": ultralytics_ap(samples, found["detections"], names)["map50_95"],
        "image_set": job.dataset.val_digest,
        "signature": signature,
    }


def _signature(backend: Backend) -> Signature:
    """Return the classes of a model, its input size in px, and the shape of its output for one image."""
    blank_BCHW = np.zeros((backend.batch or 1, backend.channels, *backend.imgsz), np.float32)
    return {"names": list(backend.names), "imgsz": list(backend.imgsz), "output": list(backend(blank_BCHW).shape[1:])}


def _latency(job: Job, candidates: list[_Candidate]) -> dict[str, Latency]:
    """Time the candidates alternately on real images, each in its own process, and return the latency by row name.

    A percentile is None if too few calls were timed for it.
    """
    config: BenchConfig = job.config
    inputs = job.work / "inputs.npy"
    batch = job.recipe.export.batch if job.recipe.export else 1
    write_inputs(inputs, job.dataset.val, job.imgsz_hw, batch)
    threads = config.threads
    specs: list[Spec] = []
    for one in candidates:
        options: Spec = {"label": one.name, "inputs": str(inputs), "warmup_n": config.warmup, "batch": batch}
        path, runtime = str(one.path), one.subject["runtime"]
        if runtime == "torch":
            folder = job.work / one.subject["model"]
            folder.mkdir(exist_ok=True)
            described: TorchSpec = {
                **torch_spec(
                    _torch(path), job.dataset.names, job.imgsz_hw, folder, device=device(job), threads=threads
                ),
                **options,
            }
            specs.append(described)
        else:
            specs.append({**options, "engine": path, "threads": threads if RUNTIMES[runtime].takes_threads else None})
    per_round = -(-config.iterations // config.rounds)
    with bar("bench: latency", len(specs) * config.rounds, "round") as advance:
        results = measure_in_turn(specs, config.rounds, per_round, progress=advance)
    raw = {one.name: result["rounds_ms"] for one, result in zip(candidates, results, strict=True)}
    atomic_write(job.out / "latency.json", json.dumps(raw) + "\n")
    return {
        one.name: {
            **percentiles(result["samples_ms"][: config.iterations]),
            "latency_quiet": result["quiet"],
            "threads": result["threads"],
        }
        for one, result in zip(candidates, results, strict=True)
    }
