"""The report: one HTML file, Markdown and JSON from the metrics of the whole chain, and the gate that decides."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_compress import environment
from yolo_compress.evaluate.ab.document import compare
from yolo_compress.evaluate.ab.schema import Side
from yolo_compress.files.atomic import atomic_write
from yolo_compress.report import devices, evidence
from yolo_compress.report.as_text import render_text
from yolo_compress.report.document import build, identified
from yolo_compress.report.gate import judge, label, peer_row
from yolo_compress.report.image_choice import choose
from yolo_compress.report.write import write
from yolo_compress.report.zeros import zeros_note
from yolo_compress.stages import Job
from yolo_compress.store.manifest import Artifact

CHAIN = ("teacher", "baseline", "sparsify", "prune", "distill", "qat")
WIDTH = 120
VALIDATED = "metrics/mAP50-95(B)"  # its column in Ultralytics' results.csv


def run(job: Job) -> dict[str, Any]:
    """report.html, report.md, report.json; `metrics["gate"]` holds the verdict and `metrics["table"]` the plain table."""
    rows, chain = evidence.with_intervals(job, job.inputs["bench"].metrics["rows"], _chain(job))
    ab = _ab(job, rows)
    rows = evidence.as_compared(rows, ab)
    document = build(
        job.recipe.name,
        chain,
        rows,
        _data(job),
        min_retention=job.config.min_retention,
        max_latency_ms=job.config.max_latency_ms,
        max_size_mib=job.config.max_size_mib,
        ab=ab,
        gammas=_gammas(job),
        channels=_channels(job),
        flops=_left(job, "flops.json"),
        sensitivity=_left(job, "sensitivity.json"),
        recovery=_recovery(job),
        environment=_environment(job),
        reproduce={"recipe_yaml": job.recipe.dump(), "command": f"make all RECIPE={shlex.quote(job.recipe.name)}"},
        not_tested=_not_tested(job, rows),
        errors=evidence.error_types(job, rows),
        latency_quantiles=evidence.latency_quantiles(job.inputs["bench"]),
        quantisation=evidence.quantisation(job.inputs["qat"]) if _own(job, "qat") else None,
        placement=evidence.placement(job.inputs["qat"]) if _own(job, "qat") else (),
    )
    return _written(job, document)


def add(job: Job, published: Artifact, files: Sequence[Path]) -> dict[str, Any]:
    """The published report once more, with what other machines measured (`report.devices.add`), into `job.out`."""
    document = json.loads(published.file("report.json").read_text(encoding="utf-8"))
    exported = {vouched["sha256"] for vouched in job.inputs["export"].manifest.files.values()}
    return _written(job, devices.add(document, files, exported))


def _written(job: Job, document: dict[str, Any]) -> dict[str, Any]:
    write(document, _gallery(job, document), job.out)
    if document["ab"] is not None:
        atomic_write(job.out / "ab.json", json.dumps(document["ab"], indent=1, allow_nan=False) + "\n")
    return {"verdict": document["verdict"], "gate": document["gate"], "table": render_text(document, WIDTH)}


def _ab(job: Job, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The original in FP32 (A) against the compressed row that decides the gate (B); None where either is missing."""
    both = evidence.compared(rows, job.config.min_retention)
    if not job.config.ab_replicates or both is None:
        return None
    latency = json.loads(job.inputs["bench"].file("latency.json").read_text())
    named = {row["id"]: row for row in identified(rows)}
    gate = judge(list(named.values()), job.config.min_retention)
    timed = (
        named[gate["timed"]] if gate["timed"] else None
    )  # of a row without a latency, the engine that the gate limits
    peer = (timed and peer_row(list(named.values()), timed)) or both[
        0
    ]  # the same runtime, else it is runtimes that are compared
    about_a, about_b, about_peer = (Side(label=f"{row['model']}, {label(row)}", row=row["id"]) for row in (*both, peer))
    document: Any = compare(
        evidence.truths(job),
        evidence.detections(job, both[0]),
        evidence.detections(job, both[1]),
        job.dataset.names,
        margin=job.config.ab_margin,
        conf=job.config.conf,
        max_det=job.recipe.data.max_det,
        replicates=job.config.ab_replicates,
        seed=job.recipe.run.seed,
        latency_a=latency[peer["id"]] if timed else None,
        latency_b=latency[timed["id"]] if timed else None,
        about_a=about_a,
        about_b=about_b,
        image_set=job.dataset.val_digest,
    )
    if timed:
        document["latency"] |= {
            "a": about_peer,
            "b": {"label": f"{timed['model']}, {label(timed)}", "row": timed["id"]},
        }
    return document


def _own(job: Job, stage: str) -> bool:
    """Whether the recipe has this stage, rather than another standing in for it."""
    return job.inputs[stage].stage == stage


def _chain(job: Job) -> list[dict[str, Any]]:
    chain = []
    for stage in CHAIN:
        if not _own(job, stage):
            continue
        artifact = job.inputs[stage]
        metrics = artifact.metrics
        wanted = ("parameters", "compute_gflops", "size_mib", "map50_95", "map50", "epochs",
                  "map50_95_after_cut", "map50_95_after_bn", "kept_flops",
                  "latency_target_ms", "latency_measured_ms", "latency_runtime", "trained_on")  # fmt: skip
        chain.append(
            {
                "stage": stage,
                "fingerprint": artifact.fingerprint,
                "status": "done",
                "seconds": artifact.manifest.seconds,
                "image_set": job.dataset.val_digest,
                **{name: metrics[name] for name in wanted if name in metrics},
            }
        )
    return chain


def _data(job: Job) -> dict[str, Any]:
    data = job.dataset
    return {
        "yaml": data.yaml.name,
        "names": list(data.names),
        "train_images": len(data.train),
        "val_images": len(data.val),
        "skipped": list(data.skipped),
        "notes": list(data.notes),
        "digest": data.digest,
    }


def _gammas(job: Job) -> dict[str, Any] | None:
    if not _own(job, "sparsify"):
        return None
    found = json.loads(job.inputs["sparsify"].file("gammas.json").read_text())
    bins = len(found["counts"][0])
    return {"edges": [found["bin_width"] * i for i in range(bins + 1)], "epochs": found["counts"]}


def _channels(job: Job) -> dict[str, Any] | None:
    return _left(job, "channels.json")


def _left(job: Job, name: str) -> dict[str, Any] | None:
    """What pruning left in `name`, where its settings make it leave that."""
    prune = job.inputs["prune"]
    return json.loads(prune.file(name).read_text()) if _own(job, "prune") and name in prune.manifest.files else None


def _recovery(job: Job) -> list[tuple[int, float]]:
    """mAP50-95 of the epochs of fine-tuning that were validated (`run.val_every`)."""
    prune = job.inputs["prune"]
    if not _own(job, "prune") or "results.csv" not in prune.manifest.files:
        return []
    rows = csv.DictReader(prune.file("results.csv").read_text().splitlines())
    return [(int(row["epoch"]), float(row[VALIDATED])) for row in rows if row.get(VALIDATED)]


def _environment(job: Job) -> dict[str, Any]:
    bench = job.inputs["bench"]
    recorded = bench.manifest.environment
    config = job.recipe.bench
    assert config is not None
    return {
        "commit": recorded.get("commit") or "not a checkout",
        "device": bench.metrics["device"],
        "versions": recorded.get("packages", {}) | {"python": recorded.get("python")},
        "imgsz_px": list(job.imgsz_hw),
        "batch": job.recipe.export.batch if job.recipe.export else 1,
        "warm_up": f"{config.warmup} calls",
        "latency": f"{config.iterations} calls an engine in {config.rounds} rounds in turn, one process an engine",
        "seed": job.recipe.run.seed,
        "report_made_with": environment.version("yolo-compress"),
    }


def _not_tested(job: Job, rows: list[dict[str, Any]]) -> list[str]:
    said = [
        "Latency is that of the engine alone: letterbox and NMS are not in it.",
        f"One training with one seed ({job.recipe.run.seed}): intervals are over the validation images, not over trainings.",
        "mAP is over the validation images alone: nothing is known of other cameras, light or objects.",
    ]
    if not any(row["runtime"] == "tensorrt" and row["status"] == "ok" for row in rows):
        said.append(
            "Nothing ran on TensorRT here. Its INT8 files were evaluated node by node; build and measure there before you deploy."
        )
    if _own(job, "prune") and job.inputs["prune"].metrics.get("kind", "channel") != "channel":
        said += zeros_note(job.inputs["prune"].metrics["kind"], job.inputs["qat"].metrics["sparsity"])
    return said


def _gallery(job: Job, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the compressed model lost or invented most, and images at random; as many of each as `report.images` says."""
    both = evidence.compared(document["rows"], job.config.min_retention)
    if not job.config.images or both is None:
        return []
    first, second = (evidence.detections(job, row) for row in both)
    flips = document["ab"]["flips"] if document["ab"] else ()
    return [
        {
            "section": section,
            "image": job.dataset.val[index].image,
            "name": job.dataset.val[index].name,
            "truths": job.dataset.val[index].boxes,
            "detections_a": first[index],
            "detections_b": second[index],
            "names": job.dataset.names,
            "min_score": job.config.conf,
        }
        for section, index in choose(flips, len(job.dataset.val), job.config.images, job.recipe.run.seed)
    ]
