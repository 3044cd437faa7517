"""What other machines measured, put beside the rows of a report: robots (`device.json`) and other recipes (`report.json`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import cast

from yolo_compress.errors import RecipeError
from yolo_compress.report.bench_rows import identified
from yolo_compress.report.device_files import DeviceFile, ReportFile, read
from yolo_compress.report.document import judged, plain
from yolo_compress.report.numbers import finite
from yolo_compress.report.schema import Device, Document, Json, Reference, Row

ADDED = ("id", "retention", "speed_up", "size_ratio", "notes")  # to a bench row, by `bench_rows`


def add(document: Document, files: Sequence[Path], onnx: Set[str] | None = None) -> Document:
    """The document with the rows of other machines; the gate is judged anew, over their INT8 rows too.

    A `device.json` adds rows of the compressed model, each with its `device`; one without mAP shows its latency and is not
    judged. A `report.json` of another recipe, measured on this machine, adds its baseline in every runtime and precision as
    a point of reference.

    Args:
        document: As `document.build` returns it, or a `report.json` read back.
        files: One or more; each device once.
        onnx: SHA-256 of the ONNX files of this recipe, in hex; a robot that measured others is refused. None: not compared.

    Raises:
        CorruptArtifact: A file that is neither, or of another schema.
        RecipeError: mAP over other images, another model, references of another machine, a file or recipe given twice.
        StorageError: A file that cannot be read.
    """
    devices, references = list(document["devices"]), list(document["references"])
    rows: list[Mapping[str, object]] = [_bare(row) for row in document["rows"]]
    for file, found in read(files):
        if isinstance(found, DeviceFile):
            _check_model(file, found, document)
            if onnx is not None:
                _check_onnx(file, found.bundle, onnx)
            device = _device(file, found, {one["name"] for one in devices})
            rows += _rows(file, found, device["name"], document["data"]["image_set"])
            devices.append(device)
        else:
            references += _references(file, found, document)
    _check_once("device", (one["name"] for one in devices))
    _check_once("reference", (one["id"] for one in references))
    gate = document["gate"]
    again = judged(identified(rows), gate["min_retention"], gate["max_latency_ms"], gate["max_size_mib"])
    return cast(Document, plain({**document, **again, "devices": devices, "references": references}))


def _check_once(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in sorted(names):
        if name in seen:
            raise RecipeError(f"add: {what} {name} is given twice; a report shows each once")
        seen.add(name)


def _check_model(file: Path, found: DeviceFile, document: Document) -> None:
    """A robot that runs another model says nothing of this one."""
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
    """The ONNX files that the robot's bundle held are those that this recipe exported."""
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


def _device(file: Path, found: DeviceFile, taken: Set[str]) -> Device:
    name = " ".join((_machine(found.about) or file.stem).split())
    if name in taken:  # a second one of a board, or the board in another mode
        name = f"{name}, {file.stem}"
    of_file = {key: found.content.get(key) for key in ("runtime", "library", "libraries", "power_from")}
    about = {"name": name, "file": file.name, "about": found.about, **of_file, "bundle": found.bundle}
    return cast(Device, {**about, "golden": found.content.get("golden")})


def _machine(about: Mapping[str, Json]) -> str:
    """The name of a machine: its board, else its GPU, else its processor; empty where it knows none."""
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
        measured = {key: value for key, value in row.items() if key not in ADDED}
        rows.append({"map50_95": None, "map50": None, "executed": None, **measured, "device": device, "golden": golden})
    return rows


def _references(file: Path, found: ReportFile, document: Document) -> list[Reference]:
    """Rows of another recipe's baseline. They are no rows of ours and have no part in the gate."""
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
    """The machine of a report, as its environment has it."""
    return _machine(device) or "None" if isinstance(device, dict) else str(device)


def _bare(row: Row) -> dict[str, object]:
    """Without what the report adds, so that it can add it again; percentiles withheld stay withheld."""
    bare = {key: value for key, value in row.items() if key not in ADDED}
    if row["status"] in ("ok", "untimed") and row["map50_95"] is None and not row.get("device"):
        bare["map50_95"] = math.nan  # null in JSON; bench measures every row, so it was no number
    return bare
