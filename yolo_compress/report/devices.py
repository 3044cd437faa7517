"""What other machines measured, put beside the rows of a report: robots (`device.json`) and other networks (`report.json`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from yolo_compress.errors import CorruptArtifact, RecipeError
from yolo_compress.files import strict_json
from yolo_compress.report.document import SCHEMA, identified, judged, plain
from yolo_compress.report.numbers import finite
from yolo_compress.runtime.errors import printable

DEVICE_SCHEMA = 1  # of `device.json`, which `bench.py` of a bundle writes on the robot
ROW = ("model", "runtime", "precision", "status")


def add(document: Mapping[str, Any], files: Sequence[Path], onnx: Set[str] | None = None) -> dict[str, Any]:
    """The document with the rows of other machines; the gate is judged anew, over their INT8 rows too.

    A `device.json` adds rows of the compressed model, each with its `device`; one without mAP shows its latency and is not
    judged. A `report.json` of another recipe, measured on this machine, adds its original in every runtime and precision as
    a point of reference.

    Args:
        document: as `document.build` returns it, or a `report.json` read back.
        files: one or more; each device once.
        onnx: SHA-256 of the ONNX files of this recipe, in hex; a robot that measured others is refused. None: not compared.

    Raises:
        CorruptArtifact: a file that is neither, or of another schema.
        RecipeError: mAP over other images, another model, references of another machine, a file or recipe given twice.
        StorageError: a file that cannot be read.
    """
    devices, references = list(document["devices"]), list(document["references"])
    rows = [dict(row) for row in document["rows"]]
    for file, found in read(files):
        if "bundle" in found:
            _check_model(file, found, document)
            if onnx is not None:
                _check_onnx(file, found["bundle"], onnx)
            device = _device(file, found, {one["name"] for one in devices})
            rows += _rows(file, found, device["name"], document["data"]["image_set"])
            devices.append(device)
        else:
            references += _references(file, found, document)
    for what, names in (("device", [one["name"] for one in devices]), ("reference", [one["id"] for one in references])):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"add: {what} {twice[0]} is given twice; a report shows each once")
    bounds = [document["gate"][key] for key in ("min_retention", "max_latency_ms", "max_size_mib")]
    again = judged(identified([_bare(row) for row in rows]), *bounds)
    return dict(plain({**document, **again, "devices": devices, "references": references}))


def read(files: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The files with what they hold, before anything is compared with a report.

    Raises:
        CorruptArtifact: A file that is neither, or of another schema.
        RecipeError: A file is given twice.
        StorageError: A file cannot be read.
    """
    pairs: list[tuple[Path, dict[str, Any]]] = []
    for file in files:
        found = _read(file)
        if any(found == earlier for _, earlier in pairs):
            raise RecipeError(f"add: {file} is given twice, perhaps under another name; a report shows each once")
        pairs.append((file, found))
    return pairs


def _read(file: Path) -> dict[str, Any]:
    hint = "; add takes a robot's device.json or a report.json"
    found = dict(_seen(strict_json.load(file, CorruptArtifact, hint, lambda _: None)))  # NaN and infinity: not measured
    if not ({"bundle", "recipe"} & set(found)) or not isinstance(found.get("rows"), list):
        raise CorruptArtifact(f"add: {file} is neither a robot's device.json nor a report.json")
    wanted = DEVICE_SCHEMA if "bundle" in found else SCHEMA
    if found.get("schema") != wanted:
        raise CorruptArtifact(
            f"add: {file} has schema {found.get('schema')}, expected {wanted}; make it with this version"
        )
    for key in ("bundle", "device", "golden", "libraries", "data", "environment"):
        if not isinstance(found.get(key) or {}, dict):
            raise CorruptArtifact(f"add: {file}: {key} is {str(found[key])[:80]!r}, expected a mapping")
    if "bundle" not in found and not isinstance(found["recipe"], str):
        raise CorruptArtifact(f"add: {file}: recipe is {str(found['recipe'])[:80]!r}, expected text")
    if "bundle" in found and not isinstance(found["bundle"], dict):
        raise CorruptArtifact(f"add: {file}: bundle is {found['bundle']!r}, expected a mapping")
    for row in found["rows"]:
        if not isinstance(row, dict):
            raise CorruptArtifact(f"add: {file}: a row is {str(row)[:80]!r}, expected a mapping")
        if absent := [key for key in ROW if key not in row]:
            raise CorruptArtifact(f"add: {file}: a row lacks {', '.join(absent)}")
        if odd := [key for key in ROW if not isinstance(row[key], str)]:
            raise CorruptArtifact(f"add: {file}: {odd[0]} of a row is {row[odd[0]]!r}, expected text")
    return found


def _seen(value: Any) -> Any:
    """JSON whose text can go to a terminal: a file of another machine may hold its control sequences."""
    if isinstance(value, dict):
        return {printable(key): _seen(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_seen(one) for one in value]
    return printable(value) if isinstance(value, str) else value


def _check_model(file: Path, found: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """A robot that runs another model says nothing of this one."""
    facts = {
        "bundle": (found["bundle"].get("name"), document["recipe"]),
        "classes": (found.get("names"), list(document["data"]["names"])),
        "imgsz": (found.get("imgsz"), document["environment"].get("imgsz_px")),
    }
    for what, (theirs, ours) in facts.items():
        if None not in (theirs, ours) and theirs != ours:
            raise RecipeError(
                f"add: {file} is of {what} {theirs}, this report of {ours}; add it to the report of its own recipe"
            )


def _check_onnx(file: Path, bundle: Mapping[str, Any], onnx: Set[str]) -> None:
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


def _device(file: Path, found: Mapping[str, Any], taken: Set[str]) -> dict[str, Any]:
    about = found.get("device") or {}
    name = about.get("board") or str(about.get("gpu") or "").split(",")[0] or about.get("cpu") or file.stem
    name = " ".join(str(name).split())
    return {
        "name": f"{name}, {file.stem}"
        if name in taken
        else name,  # a second one of a board, or the board in another mode
        "file": file.name,
        "about": about,
        "runtime": found.get("runtime"),
        "library": found.get("library"),
        "libraries": found.get("libraries"),
        "power_from": found.get("power_from"),
        "bundle": found["bundle"],
        "golden": found.get("golden"),
    }


def _rows(file: Path, found: Mapping[str, Any], device: str, image_set: str | None) -> list[dict[str, Any]]:
    rows = []
    for row in found["rows"]:
        name = f"{row['model']} {row['precision']} on {row['runtime']}"
        if row["status"] == "ok" and finite(row.get("map50_95")) is not None and row.get("image_set") != image_set:
            raise RecipeError(
                f"add: {file}: mAP of {name} is over image set {row.get('image_set')}, this report's over {image_set}; "
                "measure there on the validation images of this recipe"
            )
        golden = row.get("golden") or found.get("golden")
        rows.append({"map50_95": None, "map50": None, "executed": None, **row, "device": device, "golden": golden})
    return rows


def _references(file: Path, found: Mapping[str, Any], document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of another recipe's original, which are no rows of ours: they have no part in the gate."""
    here, there = (_machine(one) for one in (document, found))
    if here != there:
        raise RecipeError(f"add: {file} was measured on {there}, this report on {here}: their latencies do not compare")
    theirs, ours = ((one.get("data") or {}).get("image_set") for one in (found, document))
    if theirs != ours:
        raise RecipeError(f"add: mAP of {file} is over image set {theirs}, this report's over {ours}")
    keys = ("runtime", "precision", "map50_95", "latency_p50_ms", "parameters", "compute_gflops", "size_mib",
            "map50_95_low", "map50_95_high")  # fmt: skip
    return [
        {"id": f"{found['recipe']}-{row['runtime']}-{row['precision']}", "name": found["recipe"]}
        | {key: row.get(key) for key in keys}
        for row in found["rows"]
        if row["model"] == "original" and row["status"] == "ok" and not row.get("device")
    ]


def _machine(document: Mapping[str, Any]) -> str:
    device = (document.get("environment") or {}).get("device")
    if isinstance(device, Mapping):
        return str(device.get("board") or str(device.get("gpu") or "").split(",")[0] or device.get("cpu"))
    return str(device)


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without what `document.judged` adds, so that it can add it again; percentiles withheld stay withheld."""
    bare = {
        key: value for key, value in row.items() if key not in ("id", "retention", "speed_up", "size_ratio", "notes")
    }
    if row["status"] in ("ok", "untimed") and row["map50_95"] is None and not row.get("device"):
        bare["map50_95"] = math.nan  # null in JSON; bench measures every row, so it was no number
    return bare
