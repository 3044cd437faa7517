"""Add measurements of other machines (`device.json`), other recipes (`report.json`) and cascades (`cascade.json`) to a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import cast

from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.cascade.schema import CascadeDocument
from yolo_compress.report.bench_rows import with_ids
from yolo_compress.report.device_files import CascadeFile, DeviceFile, ReportFile, read
from yolo_compress.report.document import judge_rows, to_json
from yolo_compress.report.numbers import finite
from yolo_compress.report.schema import Device, Document, Json, Reference, Row

DERIVED_KEYS = ("id", "retention", "speed_up", "size_ratio", "notes")  # `bench_rows` adds these to a bench row


def add(document: Document, files: Sequence[Path], onnx: Set[str] | None = None) -> Document:
    """Return the report's document with the measurements of other machines added, and the gate judged again over all rows.

    A `device.json` adds rows of the compressed model, each with its `device`. The report shows the latency of a row without mAP,
    but the gate does not judge this row. A `report.json` of another recipe adds that recipe's baseline, in every runtime and
    precision, as a reference. The baseline must have been measured on this machine. A `cascade.json` adds a table, which the gate
    ignores. At least one of its models must be of this recipe.

    Args:
        document: Result of `document.build`, or the content of a `report.json`.
        files: Files to add, at most one per device.
        onnx: SHA-256 of the ONNX files of this recipe, in hex. A robot must have measured these files. None: no check.

    Raises:
        CorruptArtifact: A file is of no such kind, or has another schema.
        RecipeError: A file has an mAP on other images, or the figures of another model or machine. Or a file or recipe is given
            twice.
        StorageError: A file cannot be read.
    """
    devices, references = list(document["devices"]), list(document["references"])
    cascades = list(document.get("cascades", []))
    rows: list[Mapping[str, object]] = [_without_derived(row) for row in document["rows"]]
    for file, parsed in read(files):
        if isinstance(parsed, CascadeFile):
            _check_cascade(file, parsed.content, document, onnx)
            cascades.append(parsed.content)
        elif isinstance(parsed, DeviceFile):
            _check_model(file, parsed, document)
            if onnx is not None:
                _check_onnx(file, parsed.bundle, onnx)
            device = _device(file, parsed, {one["name"] for one in devices})
            if parsed.cascades:
                _check_images(file, parsed, document["data"]["image_set"])
                device["cascades"] = parsed.cascades
            rows += _rows(file, parsed, device["name"], document["data"]["image_set"])
            devices.append(device)
        else:
            references += _references(file, parsed, document)
    _check_once("device", (one["name"] for one in devices))
    _check_once("reference", (one["id"] for one in references))
    gate = document["gate"]
    limits = gate["min_retention"], gate["max_latency_ms"], gate["max_size_mib"]
    again = judge_rows(with_ids(rows), *limits, document["control"])
    added = {"cascades": cascades} if cascades else {}
    return cast(Document, to_json({**document, **again, "devices": devices, "references": references, **added}))


def _check_cascade(file: Path, found: CascadeDocument, document: Document, onnx: Set[str] | None) -> None:
    """Check that a cascade was measured on the validation images of this report, with a model of this recipe."""
    image_set = document["data"]["image_set"]
    if found["image_set"] != image_set:
        raise RecipeError(
            f"add: {file}: mAP of the cascade is over image set {found['image_set']}, this report's over {image_set}"
        )
    models = [found["small"], found["large"]]
    if onnx is not None and not onnx & {model["onnx_sha256"] for model in models}:
        raise RecipeError(f"add: {file}: neither model of the cascade is one that this recipe exported")


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in sorted(names):
        if name in seen:
            raise RecipeError(f"add: {what} {name} is given twice; a report shows each once")
        seen.add(name)


def _check_model(file: Path, found: DeviceFile, document: Document) -> None:
    """Check that the robot's model has the bundle name, classes and image size of this report."""
    facts: dict[str, tuple[Json, object]] = {
        "bundle": (found.bundle.get("name"), document["recipe"]),
        "classes": (found.content.get("names"), document["data"]["names"]),
        "imgsz": (found.content.get("imgsz"), document["environment"].get("imgsz_px")),
    }
    for what, (theirs, ours) in facts.items():
        if None not in (theirs, ours) and theirs != ours:
            raise RecipeError(
                f"add: {file} is of {what} {theirs}, this report of {ours}; add it to the report of its own recipe"
            )


def _check_onnx(file: Path, bundle: Mapping[str, Json], onnx: Set[str]) -> None:
    """Check that this recipe exported every ONNX file in the robot's bundle."""
    theirs = bundle.get("onnx")
    if not isinstance(theirs, dict) or not theirs:
        raise RecipeError(
            f"add: {file} does not say which ONNX files it measured; make a bundle with this version and run its bench.py"
        )
    for stem, digest in theirs.items():
        if str(digest) not in onnx:
            raise RecipeError(
                f"add: {file} measured another model: its {stem} is ONNX {str(digest)[:16]} (recipe fingerprint "
                f"{str(bundle.get('recipe_fingerprint'))[:16]}), which this recipe did not export; make a bundle of it and measure that"
            )


def _device(file: Path, found: DeviceFile, used_names: Set[str]) -> Device:
    name = " ".join((_machine(found.about) or file.stem).split())
    if name in used_names:  # another board of the same type, or the same board in another power mode
        name = f"{name}, {file.stem}"
    of_file = {key: found.content.get(key) for key in ("runtime", "library", "libraries", "power_from")}
    about = {"name": name, "file": file.name, "about": found.about, **of_file, "bundle": found.bundle}
    return cast(Device, {**about, "golden": found.content.get("golden")})


def _check_images(file: Path, found: DeviceFile, image_set: str | None) -> None:
    """Check that the mAP of the robot's cascades is over the validation images of this report."""
    for row in cast("list[dict[str, Json]]", found.content["cascades"]):
        if row["map50_95"] is not None and row.get("image_set") != image_set:
            raise RecipeError(
                f"add: {file}: mAP of a cascade is over image set {row.get('image_set')}, this report's over {image_set}; "
                "measure there on the validation images of this recipe"
            )


def _machine(about: Mapping[str, Json]) -> str:
    """Return the name of the machine: its board, else its GPU, else its processor, else an empty text."""
    return str(about.get("board") or str(about.get("gpu") or "").split(",")[0] or about.get("cpu") or "")


def _rows(file: Path, found: DeviceFile, device: str, image_set: str | None) -> list[Mapping[str, object]]:
    rows: list[Mapping[str, object]] = []
    for row in found.rows:
        name = f"{row['model']} {row['precision']} on {row['runtime']}"
        if row["status"] == "ok" and finite(row.get("map50_95")) is not None and row.get("image_set") != image_set:
            raise RecipeError(
                f"add: {file}: mAP of {name} is over image set {row.get('image_set')}, this report's over {image_set}; "
                "measure there on the validation images of this recipe"
            )
        golden = row.get("golden") or found.content.get("golden")
        measured = {key: value for key, value in row.items() if key not in DERIVED_KEYS}
        rows.append({"map50_95": None, "map50": None, "executed": None, **measured, "device": device, "golden": golden})
    return rows


def _references(file: Path, found: ReportFile, document: Document) -> list[Reference]:
    """Return the rows of another recipe's baseline, for comparison only: the gate ignores them."""
    here, there = _measured_on(document["environment"].get("device")), _measured_on(found.device)
    if here != there:
        raise RecipeError(f"add: {file} was measured on {there}, this report on {here}: their latencies do not compare")
    image_set = document["data"]["image_set"]
    if found.image_set != image_set:
        raise RecipeError(f"add: mAP of {file} is over image set {found.image_set}, this report's over {image_set}")
    keys = ("runtime", "precision", "map50_95", "latency_p50_ms", "parameters", "compute_gflops", "size_mib",
            "map50_95_low", "map50_95_high")  # fmt: skip
    references = []
    for row in found.rows:
        if row["model"] == "original" and row["status"] == "ok" and not row.get("device"):
            about = {"id": f"{found.recipe}-{row['runtime']}-{row['precision']}", "name": found.recipe}
            references.append(cast(Reference, {**about, **{key: row.get(key) for key in keys}}))
    return references


def _measured_on(device: Json) -> str:
    """Return the name of the machine in the environment of a report."""
    return _machine(device) or "None" if isinstance(device, dict) else str(device)


def _without_derived(row: Row) -> dict[str, object]:
    """Return the row without the ratios and notes of the report, which are then computed again.

    If the report had removed p99 because too few calls were timed, p99 is not restored.
    """
    measured = {key: value for key, value in row.items() if key not in DERIVED_KEYS}
    if row["status"] in ("ok", "untimed") and row["map50_95"] is None and not row.get("device"):
        measured["map50_95"] = (
            math.nan
        )  # bench evaluates every row of this machine, so null in JSON was NaN or infinity
    return measured
