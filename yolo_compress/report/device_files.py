"""The door for files of other machines: a robot's `device.json` or a `report.json`, checked before anything reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_compress.errors import CorruptArtifact, RecipeError
from yolo_compress.files import strict_json
from yolo_compress.report.bench_rows import ALLOWED
from yolo_compress.report.schema import SCHEMA, Json
from yolo_compress.runtime.errors import printable

DEVICE_SCHEMA = 1  # of `device.json`, which `bench.py` of a bundle writes on the robot
ROW = ("model", "runtime", "precision", "status")
MAPPINGS = ("bundle", "device", "golden", "libraries", "data", "environment")


@dataclass(frozen=True)
class DeviceFile:
    """A `device.json`. What is not checked here is `Json`: nothing is known of it.

    Attributes:
        content: The whole file.
        bundle: Name, version and digests of the bundle that was measured.
        about: Board, processor, power mode.
        rows: Bench rows; `ROW` is text in each.
    """

    content: dict[str, Json]
    bundle: dict[str, Json]
    about: dict[str, Json]
    rows: list[dict[str, Json]]


@dataclass(frozen=True)
class ReportFile:
    """A `report.json` of another recipe.

    Attributes:
        content: The whole file.
        recipe: Its name.
        image_set: Digest of its validation images.
        device: The machine that it was measured on.
        rows: Bench rows; `ROW` is text in each.
    """

    content: dict[str, Json]
    recipe: str
    image_set: Json
    device: Json
    rows: list[dict[str, Json]]


def read(files: Sequence[Path]) -> list[tuple[Path, DeviceFile | ReportFile]]:
    """Each file with what it holds. Control characters in its text become visible escapes.

    Raises:
        CorruptArtifact: A file that is neither, of another schema, or with a key of another type.
        RecipeError: A file is given twice.
        StorageError: A file that cannot be read.
    """
    pairs: list[tuple[Path, DeviceFile | ReportFile]] = []
    for file in files:
        found = _read(file)
        if any(found == earlier for _, earlier in pairs):
            raise RecipeError(f"add: {file} is given twice, perhaps under another name; a report shows each once")
        pairs.append((file, found))
    return pairs


def _read(file: Path) -> DeviceFile | ReportFile:
    found = _content(file)
    _check_mappings(file, found)
    for row in found["rows"]:
        _check_row(file, row, ("ok", "missing") if "bundle" in found else ALLOWED["status"])
    if "bundle" in found:
        return DeviceFile(found, found["bundle"], found.get("device") or {}, found["rows"])
    image_set = (found.get("data") or {}).get("image_set")
    device = (found.get("environment") or {}).get("device")
    return ReportFile(found, found["recipe"], image_set, device, found["rows"])


def _content(file: Path) -> dict[str, Any]:
    hint = "; add takes a robot's device.json or a report.json"
    found = dict(_seen(strict_json.load(file, CorruptArtifact, hint, lambda _: None)))  # NaN and infinity: not measured
    if not ({"bundle", "recipe"} & set(found)) or not isinstance(found.get("rows"), list):
        raise CorruptArtifact(f"add: {file} is neither a robot's device.json nor a report.json")
    wanted = DEVICE_SCHEMA if "bundle" in found else SCHEMA
    if found.get("schema") != wanted:
        raise CorruptArtifact(
            f"add: {file} has schema {found.get('schema')}, expected {wanted}; make it with this version"
        )
    return found


def _check_mappings(file: Path, found: dict[str, Any]) -> None:
    for key in MAPPINGS:
        if not isinstance(found.get(key) or {}, dict):
            raise CorruptArtifact(f"add: {file}: {key} is {str(found[key])[:80]!r}, expected a mapping")
    if "bundle" not in found and not isinstance(found["recipe"], str):
        raise CorruptArtifact(f"add: {file}: recipe is {str(found['recipe'])[:80]!r}, expected text")
    if "bundle" in found and not isinstance(found["bundle"], dict):
        raise CorruptArtifact(f"add: {file}: bundle is {found['bundle']!r}, expected a mapping")


def _check_row(file: Path, row: Any, statuses: Sequence[str]) -> None:
    if not isinstance(row, dict):
        raise CorruptArtifact(f"add: {file}: a row is {str(row)[:80]!r}, expected a mapping")
    if absent := [key for key in ROW if key not in row]:
        raise CorruptArtifact(f"add: {file}: a row lacks {', '.join(absent)}")
    if odd := [key for key in ROW if not isinstance(row[key], str)]:
        raise CorruptArtifact(f"add: {file}: {odd[0]} of a row is {row[odd[0]]!r}, expected text")
    for key, allowed in {**ALLOWED, "status": statuses}.items():
        if row[key] not in allowed:
            raise CorruptArtifact(f"add: {file}: {key} of a row is {row[key]!r}, expected one of {', '.join(allowed)}")
    for key, kind, expected in (("reason", str, "text"), ("signature", dict, "a mapping")):
        if row.get(key) is not None and not isinstance(row[key], kind):
            raise CorruptArtifact(f"add: {file}: {key} of a row is {str(row[key])[:80]!r}, expected {expected} or null")


def _seen(value: Any) -> Any:
    """JSON whose text can go to a terminal: a file of another machine may hold its control sequences."""
    if isinstance(value, dict):
        return {printable(key): _seen(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_seen(one) for one in value]
    return printable(value) if isinstance(value, str) else value
