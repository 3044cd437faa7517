"""Written documents match `report.schema`, and a key without a type fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.matching_scenes import NAMES, scene
from tests.support.report_case import cascade, device, document, row, rows, untimed, whole
from tests.support.report_schema import validate
from yolo_compress.evaluate.ab.comparison import compare
from yolo_compress.report import devices, schema
from yolo_compress.report.controls import steps
from yolo_compress.report.write import write

SENSITIVITY = {
    "measure": "loss",
    "dense": 2.0,
    "ratios": [0.5, 0.75],
    "groups": {"model.2": [2.1, None], "model.4": [2.0, 2.0]},
    "caps": {"model.2": 0.5, "model.4": None},
    "images": 64,
}


FIGURES = {"map50_95": 0.6, "map50": 0.9, "compute_gflops": 2.0, "parameters": 3_000_000, "epochs": 9}
CONTROL = {
    "steps": steps(
        {"baseline": [], "longer": ["longer training"], "compressed": ["the choice of channels"]},
        {"baseline": FIGURES, "longer": FIGURES, "compressed": FIGURES},
    ),
    "best": None,
    "retention": None,
    "skipped": None,
}


def everything(folder: Path) -> dict[str, Any]:
    """Return a document without empty sections: it has a robot, another recipe, a cascade, an untimed file and a failed check."""
    full: dict[str, Any] = {"sensitivity": SENSITIVITY, "control": CONTROL, "max_latency_ms": 9.0, "max_size_mib": 99.0}
    theirs = whole(recipe="yolov8s", rows=[row("original", "openvino", "fp32", 0.64)], latency_quantiles=None)
    for name, content in (("device", device()), ("other", theirs), ("cascade", cascade())):
        (folder / f"{name}.json").write_text(json.dumps(content))
    ours = whole(rows=[*rows(), untimed(0.58)], **full)
    return devices.add(ours, [folder / f"{name}.json" for name in ("device", "other", "cascade")])


def mappings(value: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Return every mapping in a document with its path; `[]` in a path stands for all entries of a list."""
    if isinstance(value, dict):
        yield at, value
        for key, one in value.items():
            yield from mappings(one, f"{at}/{key}")
    if isinstance(value, list):
        for one in value:
            yield from mappings(one, f"{at}[]")


# Mappings with arbitrary keys: names of classes, layers, groups, libraries, and facts on a device.
OPEN = (
    "/channels", "/flops", "/latency_quantiles", "/sensitivity/groups", "/sensitivity/caps", "/quantisation/groups",
    "/quantisation/compute_gflops", "/quantisation/price_ms", "/quantisation/gives_back", "/environment/device",
    "/environment/versions", "/devices[]/about", "/devices[]/about/clocks", "/devices[]/bundle", "/devices[]/golden",
    "/rows[]/golden",
)  # fmt: skip


@pytest.mark.parametrize("make", [document, whole, lambda: document([]), lambda: document(rows(float("nan")))])
def test_documents_are_as_typed(make: Any) -> None:
    validate(make())


def test_a_document_with_everything_is_as_typed_in_memory_and_as_written(tmp_path: Path) -> None:
    report = everything(tmp_path)
    assert not [key for key in schema.Document.__annotations__ if report[key] in (None, [], {})]
    assert {entry["status"] for entry in report["rows"]} == {"ok", "untimed", "missing"}
    assert report["gate"]["checks"][0]["passed"] and "not measured" in report["gate"]["checks"][1]["reason"]
    validate(report)
    validate(json.loads(write(report, [], tmp_path / "out")["json"].read_text("utf-8")))


def test_a_key_without_a_type_fails_wherever_it_stands(tmp_path: Path) -> None:
    report = everything(tmp_path)
    tried = set()
    for path, mapping in mappings(report):
        if path in OPEN or path in tried:
            continue
        tried.add(path)
        mapping["undocumented"] = 1
        with pytest.raises(ValidationError, match=r"undocumented\n"):
            validate(report)
        del mapping["undocumented"]
    validate(report)
    assert {"", "/rows[]", "/gate/checks[]", "/chain[]", "/ab/by_class[]", "/errors/a/types[]", "/placement[]"} <= tried


@pytest.mark.parametrize(("status", "key"), [("ok", "latency_p50_ms"), ("untimed", "map50_95"), ("missing", "reason")])
def test_each_form_of_a_row_has_its_keys(tmp_path: Path, status: str, key: str) -> None:
    report = everything(tmp_path)
    del next(entry for entry in report["rows"] if entry["status"] == status)[key]
    with pytest.raises(ValidationError, match=rf"{key}\n"):
        validate(report)


@pytest.mark.parametrize("timed", [True, False])
def test_the_comparison_of_two_models_is_as_typed(timed: bool) -> None:
    truths, found = scene(1, images=12)
    latency = [[1.0, 1.1], [1.2, 1.0]] if timed else None
    names = (*NAMES, "a class without objects")
    validate(compare(truths, found, found[::-1], names, replicates=5, latency_a=latency, latency_b=latency), schema.AB)
    nothing = [boxes_N6[:0] for boxes_N6 in found]
    validate(
        compare(truths, nothing, nothing, names, replicates=5, image_set="i", about_a={"label": "a", "row": "r"}),
        schema.AB,
    )
