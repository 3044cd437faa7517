"""Stage `report`: judge the gate, and write the report as HTML, Markdown and JSON from the results of all stages."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from yolo_compress.evaluate.ab.comparison import compare
from yolo_compress.evaluate.ab.schema import AB, Side
from yolo_compress.files.atomic import atomic_write
from yolo_compress.report import devices, measurements, numbers
from yolo_compress.report.as_text import render_text
from yolo_compress.report.bench_rows import label, peer_row, with_ids
from yolo_compress.report.charts.gallery import Item
from yolo_compress.report.document import Findings, build
from yolo_compress.report.gate import judge
from yolo_compress.report.image_choice import choose
from yolo_compress.report.schema import BenchRow, DataFacts, Document, Environment, Gammas, Gate, StageFigures, Verdict
from yolo_compress.report.write import write
from yolo_compress.report.zeros import zeros_note
from yolo_compress.stages import Job
from yolo_compress.store import environment
from yolo_compress.store.manifest import Artifact

CHAIN = ("teacher", "baseline", "sparsify", "prune", "distill", "qat")
FIGURES = ("parameters", "compute_gflops", "size_mib", "map50_95", "map50", "epochs",
           "map50_95_after_cut", "map50_95_after_bn", "kept_flops", "bottlenecks", "low_rank",
           "latency_target_ms", "latency_measured_ms", "latency_runtime", "trained_on", "held_map50_95_before",
           "held_map50_95_after")  # fmt: skip
WIDTH = 120
VALIDATED = "metrics/mAP50-95(B)"  # column of mAP50-95 in Ultralytics' results.csv


class Metrics(TypedDict):
    """Metrics of the stage `report`: verdict, gate and table.

    Attributes:
        table: Text of the report for a terminal of `WIDTH` columns.
    """

    verdict: Verdict
    gate: Gate
    table: str


def run(job: Job) -> Metrics:
    """Write report.html, report.md and report.json, and ab.json if there is an A/B comparison."""
    bench = job.inputs["bench"]
    rows, chain = measurements.with_intervals(job, with_ids(bench.metrics["rows"]), _chain(job))
    ab = _ab(job, rows)
    rows = measurements.with_ab_intervals(rows, ab)
    qat = job.inputs["qat"] if _own(job, "qat") else None
    found = Findings(
        recipe=job.recipe.name,
        rows=rows,
        min_retention=job.config.min_retention,
        max_latency_ms=job.config.max_latency_ms,
        max_size_mib=job.config.max_size_mib,
        chain=chain,
        data=_data(job),
        control=measurements.control(job),
        ab=ab,
        errors=measurements.error_types(job, rows),
        latency_quantiles=measurements.latency_quantiles(bench),
        gammas=_gammas(job),
        channels=_prune_file(job, "channels.json"),
        flops=_prune_file(job, "flops.json"),
        sensitivity=_prune_file(job, "sensitivity.json"),
        recovery=_recovery(job),
        quantisation=measurements.quantisation(qat) if qat else None,
        placement=measurements.placement(qat) if qat else (),
        environment=_environment(job),
        reproduce={"recipe_yaml": job.recipe.dump(), "command": f"make all RECIPE={shlex.quote(job.recipe.name)}"},
        not_tested=_not_tested(job, rows),
    )
    return _written(job, build(found))


def add(job: Job, published: Artifact, files: Sequence[Path]) -> Metrics:
    """Add the rows of other machines to the published report (`report.devices.add`), and write the new report into `job.out`."""
    document: Document = json.loads(published.file("report.json").read_text(encoding="utf-8"))
    exported = {listed["sha256"] for listed in job.inputs["export"].manifest.files.values()}
    return _written(job, devices.add(document, files, exported))


def _written(job: Job, document: Document) -> Metrics:
    write(document, _gallery(job, document), job.out)
    if document["ab"] is not None:
        atomic_write(job.out / "ab.json", json.dumps(document["ab"], indent=1, allow_nan=False) + "\n")
    return {"verdict": document["verdict"], "gate": document["gate"], "table": render_text(document, WIDTH)}


def _ab(job: Job, rows: Sequence[BenchRow]) -> AB | None:
    """Compare the baseline in FP32 (model A) with the worst row of the gate (model B). Return None if either is missing."""
    both = measurements.compared_rows(rows, job.config.min_retention)
    if not job.config.ab_replicates or both is None:
        return None
    baseline, compressed = both
    pair = _timed_pair(rows, judge(rows, job.config.min_retention), baseline)
    latency = json.loads(job.inputs["bench"].file("latency.json").read_text())
    latency_a, latency_b = (latency[row["id"]] for row in pair) if pair else (None, None)
    document = compare(
        measurements.truths(job),
        measurements.detections(job, baseline),
        measurements.detections(job, compressed),
        job.dataset.names,
        margin=job.config.ab_margin,
        conf=job.config.conf,
        max_det=job.recipe.data.max_det,
        replicates=job.config.ab_replicates,
        seed=job.recipe.run.seed,
        latency_a=latency_a,
        latency_b=latency_b,
        about_a=_contender(baseline),
        about_b=_contender(compressed),
        image_set=job.dataset.val_digest,
    )
    if pair and document["latency"] is not None:
        document["latency"]["a"], document["latency"]["b"] = _contender(pair[0]), _contender(pair[1])
    return document


def _timed_pair(rows: Sequence[BenchRow], gate: Gate, baseline: BenchRow) -> tuple[BenchRow, BenchRow] | None:
    """Return the two rows for the comparison of latency: the baseline (A), and the worst row of the gate with a latency (B).

    The worst row of all may be a file without an engine, which has no latency. B is then another row. A is the baseline in the
    runtime of B. If there is no such row, A is `baseline`, and the comparison includes the difference between the runtimes.
    """
    timed = next((row for row in rows if row["id"] == gate["timed"]), None)
    return None if timed is None else (peer_row(rows, timed) or baseline, timed)


def _contender(row: BenchRow) -> Side:
    return {"label": f"{numbers.model(row['model'])}, {label(row)}", "row": row["id"]}


def _own(job: Job, stage: str) -> bool:
    """Return whether the recipe has this stage. If not, `job.inputs` has the artefact of its stand-in."""
    return job.inputs[stage].stage == stage


def _chain(job: Job) -> list[StageFigures]:
    chain = []
    for stage in CHAIN:
        if not _own(job, stage):
            continue
        artifact = job.inputs[stage]
        metrics = artifact.metrics
        figures = {
            "stage": stage,
            "fingerprint": artifact.fingerprint,
            "status": "done",
            "seconds": artifact.manifest.seconds,
            "image_set": job.dataset.val_digest,
            **{name: metrics[name] for name in FIGURES if name in metrics},
        }
        chain.append(cast(StageFigures, figures))
    return chain


def _data(job: Job) -> DataFacts:
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


def _gammas(job: Job) -> Gammas | None:
    if not _own(job, "sparsify"):
        return None
    found = json.loads(job.inputs["sparsify"].file("gammas.json").read_text())
    bins = len(found["counts"][0])
    return {"edges": [found["bin_width"] * i for i in range(bins + 1)], "epochs": found["counts"]}


def _prune_file(job: Job, name: str) -> Any:
    """Return the content of a JSON file of `prune`. None: the recipe does not prune, or `prune` did not write the file."""
    prune = job.inputs["prune"]
    return json.loads(prune.file(name).read_text()) if _own(job, "prune") and name in prune.manifest.files else None


def _recovery(job: Job) -> list[tuple[int, float]]:
    """Return (epoch, mAP50-95) for each validated epoch of fine-tuning. `run.val_every` decides which epochs are validated."""
    prune = job.inputs["prune"]
    if not _own(job, "prune") or "results.csv" not in prune.manifest.files:
        return []
    rows = csv.DictReader(prune.file("results.csv").read_text().splitlines())
    return [(int(row["epoch"]), float(row[VALIDATED])) for row in rows if row.get(VALIDATED)]


def _environment(job: Job) -> Environment:
    bench = job.inputs["bench"]
    recorded = bench.manifest.environment
    config = job.recipe.bench
    assert config is not None
    return {
        "commit": recorded.get("commit"),
        "device": bench.metrics["device"],
        "versions": {**recorded.get("packages", {}), "python": recorded.get("python")},
        "imgsz_px": list(job.imgsz_hw),
        "batch": job.recipe.export.batch if job.recipe.export else 1,
        "warm_up": f"{config.warmup} calls",
        "latency": f"{config.iterations} calls an engine in {config.rounds} rounds in turn, one process an engine",
        "seed": job.recipe.run.seed,
        "report_made_with": environment.version("yolo-compress"),
    }


def _not_tested(job: Job, rows: Sequence[BenchRow]) -> list[str]:
    sentences = [
        "Latency is that of the engine alone, without letterbox and NMS.",
        f"One training with one seed ({job.recipe.run.seed}): the intervals cover the choice of validation images, not of the seed.",
        "mAP holds for the validation images: other cameras, light or objects were not tested.",
    ]
    timed = [row for row in rows if row["status"] == "ok" and row.get("latency_quiet") is not None]
    if disturbed := sum(not row["latency_quiet"] for row in timed):
        sentences.append(
            f"Other programs used the processors while {disturbed} of {len(timed)} engines were timed. Repeat `bench` with "
            "force=true on a quiet machine before you trust a latency."
        )
    if not any(row["runtime"] == "tensorrt" and row["status"] == "ok" for row in rows):
        sentences.append(
            "Nothing ran on TensorRT here. Its INT8 files were evaluated node by node. "
            "Build and measure on the robot before you deploy."
        )
    if job.recipe.control and (skipped := job.inputs["control"].metrics["skipped"]):
        sentences.append(f"No control was trained: {skipped}.")
    if _own(job, "prune") and job.inputs["prune"].metrics.get("kind"):
        sentences += zeros_note(job.inputs["prune"].metrics["kind"], job.inputs["qat"].metrics["sparsity"])
    return sentences


def _gallery(job: Job, document: Document) -> list[Item]:
    """Return the images of the gallery: up to `report.images` in each section of `image_choice.SECTIONS`."""
    both = measurements.compared_rows(document["rows"], job.config.min_retention)
    if not job.config.images or both is None:
        return []
    first, second = (measurements.detections(job, row) for row in both)
    flips = document["ab"]["flips"] if document["ab"] else ()
    return [
        Item(
            image=job.dataset.val[index].image,
            truths=job.dataset.val[index].boxes,
            detections_a=first[index],
            detections_b=second[index],
            names=job.dataset.names,
            name=job.dataset.val[index].name,
            section=section,
            min_score=job.config.conf,
        )
        for section, index in choose(flips, len(job.dataset.val), job.config.images, job.recipe.run.seed)
    ]
