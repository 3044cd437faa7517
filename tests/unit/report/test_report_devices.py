"""Rows of robots and of other recipes in a report: other images are refused, and the gate is judged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.report_case import EVIL, IMAGES, built, cascade, device, document, row, rows, whole
from yolo_compress.cli import grammar
from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.report import devices
from yolo_compress.report.as_text import render_markdown, render_text
from yolo_compress.report.charts.scatter import accuracy_over_latency
from yolo_compress.report.numbers import DASH
from yolo_compress.report.tables.bench import bench_table, devices_table
from yolo_compress.report.tables.cascade import cascade_table
from yolo_compress.report.write import write


def file(folder: Path, content: Any, name: str = "device.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def published(**changes: Any) -> dict[str, Any]:
    """Return a document as read from report.json."""
    return dict(json.loads(json.dumps(whole(**changes))))


def test_a_robot_stands_beside_this_machine(tmp_path: Path) -> None:
    report = devices.add(published(), [file(tmp_path, device())])
    lines = devices_table(report).lines
    title = [column.title for column in devices_table(report).columns]
    found = {(line.group, line.cells[2]): dict(zip(title, line.cells, strict=True)) for line in lines}
    assert set(found) == {
        ("this machine", "FP32"), ("this machine", "INT8"),
        ("NVIDIA Jetson Orin Nano", "FP16"), ("NVIDIA Jetson Orin Nano", "INT8"),
    }  # fmt: skip
    int8 = found["NVIDIA Jetson Orin Nano", "INT8"]
    assert (
        int8["mAP50-95"] == "0.588" and int8["Retention"] == "98.0 %" and int8["W"] == "7.50" and int8["mJ"] == "50.0"
    )
    timed = found["NVIDIA Jetson Orin Nano", "FP16"]
    assert timed["mAP50-95"] == timed["Retention"] == DASH and timed["p50 ms"] == "3.00", "no mAP: latency only"
    assert not any(line.group.startswith("TensorRT (") for line in bench_table(report).lines), (
        "the bench is of this machine"
    )
    for text in (render_text(report, 200), render_markdown(report)):
        assert "NVIDIA Jetson Orin Nano" in text
    assert "TensorRT 10.3.0; nvpmodel 15W; clocks gpu_hz 1020000000; bundle bccd version 3" in render_markdown(report)
    assert "golden images passed: boxes within 0.120 px, scores within 0.0004" in render_markdown(report)


def test_the_gate_is_judged_over_the_robots_rows_too(tmp_path: Path) -> None:
    before = published()
    assert before["gate"]["passed"] and len(before["gate"]["judged"]) == 1
    bad = device()
    bad["rows"][0]["map50_95"] = 0.4
    after = devices.add(before, [file(tmp_path, bad)])
    assert not after["gate"]["passed"] and after["gate"]["worst"] == "compressed-tensorrt-int8-NVIDIA Jetson Orin Nano"
    assert "INT8 on TensorRT on NVIDIA Jetson Orin Nano has 66.7 %" in after["verdict"]["line"]
    assert before == published(), "the published document does not change"


def test_limits_hold_for_the_robot_that_decides(tmp_path: Path) -> None:
    after = devices.add(published(max_latency_ms=9.0), [file(tmp_path, device())])
    assert (
        after["gate"]["max_latency_ms"] == 9.0
        and after["gate"]["checks"][0]["value"] == 2.0
        and after["gate"]["passed"]
    )


def test_without_its_own_map_a_robot_changes_no_verdict(tmp_path: Path) -> None:
    only_timed = device(rows=device()["rows"][1:])
    assert devices.add(published(), [file(tmp_path, only_timed)])["verdict"] == published()["verdict"]
    # A row of this machine with mAP NaN stays NaN, and still decides.
    broken = published(rows=rows(float("nan")))
    assert not devices.add(broken, [file(tmp_path, device())])["gate"]["passed"]


def test_map_over_other_images_is_refused(tmp_path: Path) -> None:
    other = device()
    other["rows"][0]["image_set"] = "b2" * 32
    with pytest.raises(
        RecipeError, match=f"compressed int8 on tensorrt is over image set {'b2' * 32}, this report's over {IMAGES}"
    ):
        devices.add(published(), [file(tmp_path, other)])


def test_a_robot_that_runs_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    names = published()["data"]["names"]
    assert devices.add(published(), [file(tmp_path, {**device(), "names": names})])["devices"]
    with pytest.raises(RecipeError, match=r"is of classes .*ghost"):
        devices.add(published(), [file(tmp_path, {**device(), "names": [*names, "ghost"]})])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not usable JSON .*; add takes a robot's device.json"),
        ("[]", "is a list, expected a mapping; add takes"),
        ("[" * 100_000, "nested too deeply"),
        ('{"rows": [1' + "0" * 400 + "]}", "a whole number of 401 digits"),
        ({"schema": 1, "rows": []}, "neither a robot's device.json nor a report.json"),
        (
            {"schema": 3, "recipe": "x", "rows": [{"model": "original", "status": "ok"}]},
            "a row lacks runtime, precision",
        ),
        ({"schema": 3, "recipe": [], "rows": []}, "recipe is '\\[\\]', expected text"),
        ({"schema": 9, "bundle": {}, "rows": []}, "has schema 9, expected 1"),
        ({"schema": 1, "recipe": "x", "rows": []}, "has schema 1, expected 3"),
        ({"schema": 1, "bundle": {}, "rows": [{"model": "compressed"}]}, "a row lacks runtime, precision, status"),
    ],
)
def test_what_is_no_device_json_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(CorruptArtifact, match=said):
        devices.add(published(), [file(tmp_path, content)])
    with pytest.raises(StorageError, match="absent"):
        devices.add(published(), [tmp_path / "absent.json"])


def test_a_device_is_given_once_and_two_of_a_board_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"again\.json is given twice"):
        devices.add(published(), [file(tmp_path, device()), file(tmp_path, device(), "again.json")])
    saving = device()
    saving["rows"][0]["latency_p50_ms"] = 9.0
    both = devices.add(published(), [file(tmp_path, device()), file(tmp_path, saving, "15w.json")])
    assert [one["name"] for one in both["devices"]] == ["NVIDIA Jetson Orin Nano", "NVIDIA Jetson Orin Nano, 15w"]
    other = device(device={"gpu": "Orin AGX, 540.4, 50 W"})
    report = devices.add(published(), [file(tmp_path, device()), file(tmp_path, other, "agx.json")])
    assert [entry["name"] for entry in report["devices"]] == ["NVIDIA Jetson Orin Nano", "Orin AGX"]


def test_other_recipes_are_points_of_reference(tmp_path: Path) -> None:
    theirs = published(
        recipe="yolov8s", rows=[row("original", "openvino", "fp32", 0.64), row("compressed", "openvino", "int8", 0.62)]
    )
    report = devices.add(published(), [file(tmp_path, theirs, "report.json")])
    assert [entry["id"] for entry in report["references"]] == ["yolov8s-openvino-fp32"], "only its baseline"
    assert report["gate"] == published()["gate"], "a reference has no part in the gate"
    assert ">yolov8s, OpenVINO FP32<" in accuracy_over_latency(report)["wide"]
    elsewhere = {**theirs, "environment": {"device": {"cpu": "another CPU"}}}
    with pytest.raises(RecipeError, match="measured on another CPU, this report on some CPU"):
        devices.add(published(), [file(tmp_path, elsewhere, "report.json")])
    images = {**theirs, "data": {**theirs["data"], "image_set": "c3"}}
    with pytest.raises(RecipeError, match="over image set c3"):
        devices.add(published(), [file(tmp_path, images, "report.json")])


def test_a_failed_self_test_and_a_hostile_name_are_shown(tmp_path: Path) -> None:
    failed = device(device={"board": EVIL}, golden={"passed": False, "worst_box_px": 9.0, "worst_score": 0.5})
    bare = built(rows(), recipe="bccd")
    html = write(devices.add(bare, [file(tmp_path, failed)]), [], tmp_path / "out")["html"].read_text("utf-8")
    assert "self-test not passed" in html and "golden images FAILED" in html and "<script" not in html


def test_an_engine_that_failed_its_self_test_passes_no_gate(tmp_path: Path) -> None:
    failed = device(golden={"passed": False, "worst_box_px": 9.0, "worst_score": 0.5})
    gate = devices.add(published(), [file(tmp_path, failed)])["gate"]
    assert published()["gate"]["passed"] and not gate["passed"] and "failed its golden self-test" in gate["reason"]


@pytest.mark.parametrize("change", [{"bundle": {"name": "other"}}, {"imgsz": [64, 32]}])
def test_a_robot_that_runs_another_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    ours = published()
    ours["environment"]["imgsz_px"] = [320, 320]
    with pytest.raises(RecipeError, match="add it to the report of its own recipe"):
        devices.add(ours, [file(tmp_path, device(**change))])


@pytest.mark.parametrize(
    ("key", "value"), [("bundle", None), ("device", "x"), ("golden", [1]), ("libraries", 3), ("rows", [1])]
)
def test_a_damaged_device_json_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CorruptArtifact, match="expected a mapping|neither"):
        devices.add(published(), [file(tmp_path, {**device(), key: value})])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reason", [1]),
        ("signature", 3),
        ("precision", "int4"),
        ("model", "another"),
        ("status", "untimed"),
        ("status", "done"),
        ("runtime", None),
    ],
)
def test_a_damaged_row_of_a_device_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    damaged = device()
    damaged["rows"][0][key] = value
    with pytest.raises(CorruptArtifact, match=rf"{key} of a row is .*expected"):
        devices.add(published(), [file(tmp_path, damaged)])


def test_a_device_names_no_row_of_the_report(tmp_path: Path) -> None:
    forged = device()
    forged["rows"][0] |= {"id": "original-torch-fp32", "retention": 1.0}
    report = devices.add(published(), [file(tmp_path, forged)])
    assert report["rows"] == devices.add(published(), [file(tmp_path, device())])["rows"]


@pytest.mark.parametrize(("key", "value"), [("precision", "int4"), ("status", [])])
def test_a_damaged_row_of_another_report_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    theirs = published(recipe="yolov8s")
    theirs["rows"][0][key] = value
    with pytest.raises(CorruptArtifact, match=rf"{key} of a row is .*expected"):
        devices.add(published(), [file(tmp_path, theirs, "report.json")])


def bound(tmp_path: Path, **changes: Any) -> Path:
    """Return a device.json whose bundle has these ONNX files."""
    content = device()
    content["bundle"] = {**content["bundle"], "recipe_fingerprint": "e5" * 32, **changes}
    return file(tmp_path, content)


@pytest.mark.fault(87)
def test_a_robot_that_measured_another_model_is_not_judged(tmp_path: Path) -> None:
    """Name, classes, size and images are equal, as after training the same recipe again."""
    ours = {"a1" * 32, "b2" * 32, "c3" * 32}
    same = bound(tmp_path, onnx={"fp32": "a1" * 32, "int8": "b2" * 32})
    assert len(devices.add(published(), [same], ours)["gate"]["judged"]) == 2
    other = bound(tmp_path, onnx={"fp32": "a1" * 32, "int8": "d4" * 32})
    with pytest.raises(RecipeError, match=r"another model: its int8 is ONNX d4d4.* \(recipe fingerprint e5e5"):
        devices.add(published(), [other], ours)
    for silent in ({}, {"onnx": {}}, {"onnx": "a1" * 32}, {"onnx": {"int8": [1]}}):
        with pytest.raises(RecipeError, match="does not say which ONNX files|another model"):
            devices.add(published(), [bound(tmp_path, **silent)], ours)


def test_control_sequences_of_a_device_json_do_not_reach_the_terminal(tmp_path: Path) -> None:
    hostile = device(device={"board": "\x1b[31mOrin\x1b]0;pwned\x07\u202e", "\x1bkey": ["\x9b1m"]}, library="\x1bc")
    hostile["rows"][0]["executed"] = "int8\x1b[2J"
    report = devices.add(published(), [file(tmp_path, hostile)])
    for text in (render_text(report, 200), render_markdown(report), json.dumps(report, ensure_ascii=False)):
        assert not {c for c in text if not c.isprintable() and c != "\n"}
    assert report["devices"][0]["name"] == r"\x1b[31mOrin\x1b]0;pwned\x07\u202e"
    hostile["bundle"]["name"] = "\x1b[31mother"
    with pytest.raises(RecipeError) as refusal:
        devices.add(published(), [file(tmp_path, hostile)])
    assert str(refusal.value).isprintable()


@pytest.mark.fault(68)
def test_what_is_no_number_is_shown_as_none(tmp_path: Path) -> None:
    odd = device()
    odd["rows"][0].update(latency_p50_ms=float("nan"), power_w=[1], latency_n="many", fps={})
    write(devices.add(published(), [file(tmp_path, odd)]), [], tmp_path / "out")
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()


def test_the_command_line() -> None:
    command = grammar.parse(["report", "recipe=bccd", "add=a.json,b.json", "out=folder"])
    assert command.options == {"add": "a.json,b.json", "out": "folder"} and command.overrides == ()
    assert "[add=device.json[,more.json]] [out=FOLDER]" in grammar.VERBS["report"].usage
    with pytest.raises(RecipeError, match="out needs add; give both or neither"):
        grammar.parse(["report", "out=folder"])
    with pytest.raises(RecipeError, match="bench takes no add"):
        grammar.parse(["bench", "add=a.json"])


def test_a_report_without_devices_says_nothing_of_them(tmp_path: Path) -> None:
    assert devices_table(document()).lines == ()
    bare = built(rows())
    assert 'id="devices"' not in write(bare, [], tmp_path)["html"].read_text("utf-8")


def test_a_cascade_has_a_table_and_changes_no_verdict(tmp_path: Path) -> None:
    before = published()
    after = devices.add(before, [file(tmp_path, cascade(), "cascade.json")], {"2" * 64})
    assert "cascades" not in before and {**after, "cascades": None} == {**before, "cascades": None}
    table = cascade_table(after["cascades"])
    assert [line.cells[0] for line in table.lines] == ["small", "large", "cascade"]
    assert table.lines[2].cells == ("cascade", "0.580", "6.00", "2.10", "12.7", "62.5 %")
    assert table.lines[2].mark == "passed" and table.notes[-1].startswith("PASS: use the cascade")
    write(after, [], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert '<h2 id="cascades">' in page and EVIL not in page and "62.5 %" in page
    for text in (render_text(after, 200), render_markdown(after)):
        assert "Cascades" in text and "62.5 %" in text
    twice = devices.add(after, [file(tmp_path, cascade(images=88), "other.json")])
    assert [line.cells[0] for line in cascade_table(twice["cascades"]).lines][3:] == [
        "2: small",
        "2: large",
        "2: cascade",
    ]


def robot_cascade(**changes: Any) -> dict[str, Any]:
    """A cascade in a device.json; other keys of it do not come into the report."""
    figures = {
        "map50_95": 0.57,
        "kept": 0.7,
        "mean_ms": 8.0,
        "p50_ms": 4.0,
        "p99_ms": 21.0,
        "small_ms": 4.0,
        "large_ms": 16.0,
    }
    return {"runtime": "tensorrt", "image_set": IMAGES, "executed": EVIL, **figures, **changes}


def test_a_cascade_of_a_robot_is_in_the_table_of_cascades(tmp_path: Path) -> None:
    after = devices.add(published(), [file(tmp_path, device(cascades=[robot_cascade()]))])
    (one,) = after["devices"]
    assert "executed" not in one["cascades"][0] and one["cascades"][0]["p99_ms"] == 21.0
    table = cascade_table([], after["devices"])
    name = "NVIDIA Jetson Orin Nano, TensorRT"
    assert [line.cells for line in table.lines] == [
        (f"{name}: small", *(DASH, "4.00", *[DASH] * 3)),
        (f"{name}: large", *(DASH, "16.0", *[DASH] * 3)),
        (f"{name}: cascade", "0.570", "8.00", "4.00", "21.0", "70.0 %"),
    ]
    write(after, [], tmp_path / "out")
    assert f"{name}: cascade" in (tmp_path / "out/report.html").read_text()
    assert after["verdict"] == devices.add(published(), [file(tmp_path, device())])["verdict"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"image_set": "other"}, RecipeError, "mAP of a cascade is over image set other"),
        ({"mean_ms": "8"}, CorruptArtifact, r"cascades.0.mean_ms: Input should be a valid number; run bench.py again"),
        ({"kept": None}, CorruptArtifact, r"cascades.0.kept"),
    ],
)
def test_a_damaged_cascade_of_a_robot_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        devices.add(published(), [file(tmp_path, device(cascades=[robot_cascade(**changes)]))])


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"image_set": "other"}, RecipeError, "over image set other"),
        ({"small": None}, CorruptArtifact, "small: Input should be a valid dictionary"),
        ({"verdict": {"status": "good"}}, CorruptArtifact, "verdict"),
        ({"schema": 2}, CorruptArtifact, "has schema 2, expected 1"),
    ],
)
def test_a_cascade_of_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        devices.add(published(), [file(tmp_path, cascade(**changes), "cascade.json")])


def test_a_cascade_of_other_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="neither model of the cascade is one that this recipe exported"):
        devices.add(published(), [file(tmp_path, cascade(), "cascade.json")], {"3" * 64})
