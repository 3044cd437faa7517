"""Read and check files to add: `device.json` of a robot, `report.json` of another recipe, or `cascade.json` of a cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_compress.errors import CorruptArtifact, RecipeError
from yolo_compress.evaluate.cascade.schema import SCHEMA as CASCADE_SCHEMA
from yolo_compress.evaluate.cascade.schema import CascadeDocument, validated
from yolo_compress.files import strict_json
from yolo_compress.report.bench_rows import ALLOWED
from yolo_compress.report.schema import SCHEMA, DeviceCascade, Json
from yolo_compress.runtime.commands.device_json import SCHEMA as DEVICE_SCHEMA
from yolo_compress.runtime.errors import printable

ROW_TEXT_KEYS = ("model", "runtime", "precision", "status")
MAPPING_KEYS = ("bundle", "device", "golden", "libraries", "data", "environment")


@dataclass(frozen=True)
class DeviceFile:
    """Content of a `device.json`: measurements on a robot. Values of type `Json` are not checked.

    Attributes:
        content: All keys of the file.
        bundle: Name, version and digests of the bundle that was measured.
        about: Board, processor and power mode of the robot.
        rows: Bench rows. The keys in `ROW_TEXT_KEYS` are text in each.
        cascades: Cascades that were measured. All keys have the types of the schema.
    """

    content: dict[str, Json]
    bundle: dict[str, Json]
    about: dict[str, Json]
    rows: list[dict[str, Json]]
    cascades: list[DeviceCascade]


@dataclass(frozen=True)
class ReportFile:
    """A `report.json` of another recipe.

    Attributes:
        content: All keys of the file.
        recipe: Name of the other recipe.
        image_set: Digest of its validation images.
        device: Machine that it was measured on.
        rows: Bench rows. In each row, the keys in `ROW_TEXT_KEYS` are text.
    """

    content: dict[str, Json]
    recipe: str
    image_set: Json
    device: Json
    rows: list[dict[str, Json]]


@dataclass(frozen=True)
class CascadeFile:
    """A `cascade.json`. All keys of `content` have the types of its schema."""

    content: CascadeDocument


def read(files: Sequence[Path]) -> list[tuple[Path, DeviceFile | ReportFile | CascadeFile]]:
    """Read and check each file, and return it with its path. Control characters in texts become visible escapes.

    Raises:
        CorruptArtifact: A file is of no such kind, has another schema, or has a key of the wrong type.
        RecipeError: `files` lists a file twice.
        StorageError: A file cannot be read.
    """
    pairs: list[tuple[Path, DeviceFile | ReportFile | CascadeFile]] = []
    for file in files:
        parsed = _read(file)
        if any(parsed == earlier for _, earlier in pairs):
            raise RecipeError(f"add: {file} is given twice, perhaps under another name; a report shows each once")
        pairs.append((file, parsed))
    return pairs


def _read(file: Path) -> DeviceFile | ReportFile | CascadeFile:
    content = _content(file)
    if "cascade" in content:
        return _cascade(file, content)
    _check_mappings(file, content)
    for row in content["rows"]:
        _check_row(file, row, ("ok", "missing") if "bundle" in content else ALLOWED["status"])
    if "bundle" in content:
        cascades = _device_cascades(file, content)
        return DeviceFile(content, content["bundle"], content.get("device") or {}, content["rows"], cascades)
    image_set = (content.get("data") or {}).get("image_set")
    device = (content.get("environment") or {}).get("device")
    return ReportFile(content, content["recipe"], image_set, device, content["rows"])


def _content(file: Path) -> dict[str, Any]:
    hint = "; add takes a robot's device.json, a report.json or a cascade.json"
    # NaN and infinity become None, which means not measured.
    content = dict(_escape_control(strict_json.load(file, CorruptArtifact, hint, lambda _: None)))
    measured = isinstance(content.get("rows"), list) and ({"bundle", "recipe"} & set(content))
    if not (measured or "cascade" in content):
        raise CorruptArtifact(f"add: {file} is neither a robot's device.json nor a report.json or cascade.json")
    expected = CASCADE_SCHEMA if "cascade" in content else DEVICE_SCHEMA if "bundle" in content else SCHEMA
    if content.get("schema") != expected:
        raise CorruptArtifact(
            f"add: {file} has schema {content.get('schema')}, expected {expected}; make it with this version"
        )
    return content


def _cascade(file: Path, content: Mapping[str, object]) -> CascadeFile:
    try:
        return CascadeFile(validated(content))
    except ValueError as error:
        raise CorruptArtifact(f"add: {file}: {error}; run `yolo-compress cascade` again") from error


def _device_cascades(file: Path, content: Mapping[str, object]) -> list[DeviceCascade]:
    """Return the cascades of a `device.json`, with the keys of `DeviceCascade` only."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(list[DeviceCascade]).validate_python(content.get("cascades", []), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("cascades", *first["loc"])))
        raise CorruptArtifact(f"add: {file}: {where}: {first['msg']}; run bench.py again") from error


def _check_mappings(file: Path, content: dict[str, Any]) -> None:
    for key in MAPPING_KEYS:
        if not isinstance(content.get(key) or {}, dict):
            raise CorruptArtifact(f"add: {file}: {key} is {str(content[key])[:80]!r}, expected a mapping")
    if "bundle" not in content and not isinstance(content["recipe"], str):
        raise CorruptArtifact(f"add: {file}: recipe is {str(content['recipe'])[:80]!r}, expected text")
    if "bundle" in content and not isinstance(content["bundle"], dict):
        raise CorruptArtifact(f"add: {file}: bundle is {content['bundle']!r}, expected a mapping")


def _check_row(file: Path, row: Any, statuses: Sequence[str]) -> None:
    if not isinstance(row, dict):
        raise CorruptArtifact(f"add: {file}: a row is {str(row)[:80]!r}, expected a mapping")
    if absent := [key for key in ROW_TEXT_KEYS if key not in row]:
        raise CorruptArtifact(f"add: {file}: a row lacks {', '.join(absent)}")
    if wrong := [key for key in ROW_TEXT_KEYS if not isinstance(row[key], str)]:
        raise CorruptArtifact(f"add: {file}: {wrong[0]} of a row is {row[wrong[0]]!r}, expected text")
    for key, allowed in {**ALLOWED, "status": statuses}.items():
        if row[key] not in allowed:
            raise CorruptArtifact(f"add: {file}: {key} of a row is {row[key]!r}, expected one of {', '.join(allowed)}")
    for key, kind, expected in (("reason", str, "text"), ("signature", dict, "a mapping")):
        if row.get(key) is not None and not isinstance(row[key], kind):
            raise CorruptArtifact(f"add: {file}: {key} of a row is {str(row[key])[:80]!r}, expected {expected} or null")


def _escape_control(value: Any) -> Any:
    """Escape control characters in all texts of a JSON value. A terminal would execute control characters of an untrusted file."""
    if isinstance(value, dict):
        return {printable(key): _escape_control(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escape_control(one) for one in value]
    return printable(value) if isinstance(value, str) else value
