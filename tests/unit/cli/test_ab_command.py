"""`yolo-compress ab`: rows of a bench as they were measured, engines and checkpoints as they run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.noise_set import noise_set
from yolo_compress.cli import ab
from yolo_compress.cli.main import main
from yolo_compress.data.dataset import load
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.ab.contender import open_contender
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.evaluate.stored_detections import keep
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.measure.coco_map import mean_ap
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint

NAMES, IMGSZ = ("bolt", "nut"), (64, 96)
ROWS = ("original-torch-fp32", "compressed-onnxruntime-int8")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return noise_set(tmp_path, train=2, val=12)


def bench(root: Path, data: Path, b_loses: int = 0, **changes: Any) -> Path:
    """A published bench: A finds everything, B all but the first `b_loses`."""
    dataset = load(str(data), on_bad="skip")
    truths = [absolute_boxes(sample) for sample in dataset.val]
    found = [np.column_stack([t[:, 1:], np.full(len(t), 0.9), t[:, 0]]).astype(np.float32) for t in truths]
    key = {"stage": "bench", "version": 2, "data": {"imgsz": list(IMGSZ)}, "changes": str(changes), "loses": b_loses}
    store, stamp = Store(root / "weights"), fingerprint(key)
    out = store.partial("bench", stamp)
    (out / "detections").mkdir()
    rows, latency = [], {}
    for name, lost, ms in zip(ROWS, (0, b_loses), (10.0, 4.0), strict=True):
        detections = [rows_N6[:0] if i < lost else rows_N6 for i, rows_N6 in enumerate(found)]
        keep(out / "detections" / f"{name}.npy", detections)
        model, runtime, precision = name.split("-")
        rows.append(
            {"model": model, "runtime": runtime, "precision": precision, "status": "ok", "executed": precision,
             "image_set": dataset.val_digest, "map50_95": mean_ap(truths, detections, NAMES)["map50_95"], **changes}
        )  # fmt: skip
        latency[name] = [[ms, ms], [ms, ms]]
    rows.append(
        {"model": "compressed", "runtime": "tensorrt", "precision": "int8", "status": "missing", "reason": "no GPU"}
    )
    (out / "latency.json").write_text(json.dumps(latency))
    return store.publish("bench", stamp, key, {"rows": rows, "images": len(truths)}, {}, 1.0).path


def called(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    code = main(["ab", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_rows_of_a_bench_are_compared_without_running_anything(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench(data.parent, data)
    words = (f"a={folder}:{ROWS[0]}", f"b={folder}:{ROWS[1]}", f"data={data}", "replicates=100", "out=found.json")
    code, lines, err = called(capsys, *words)
    document = json.loads(lines[-1])
    assert (
        code == 0 and lines[0] == document["verdict"]["line"] and lines[0].startswith("PASS: mAP50-95 of B is at most")
    )
    assert document == json.loads(Path("found.json").read_text())
    assert document["latency"] == {"a_p50_ms": 10, "b_p50_ms": 4, "ratio": 2.5, "low": 2.5, "high": 2.5}
    assert document["images"] == 12 and document["a"]["imgsz"] == list(IMGSZ) and not err.strip()
    assert any(line.startswith("bolt (6)") for line in lines) and lines[-2] == "B: conf=0.8999 gives B the recall of A"


def test_a_clear_loss_fails_and_a_slight_one_is_inconclusive(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lost, status in ((9, "FAIL"), (1, "INCONCLUSIVE")):
        folder = bench(data.parent, data, lost)
        code, lines, _ = called(
            capsys, f"a={folder}:{ROWS[0]}", f"b={folder}:{ROWS[1]}", f"data={data}", "replicates=200"
        )
        document = json.loads(lines[-1])
        assert code == 1 and lines[0].startswith(f"{status}: ")
        assert document["operating"]["mcnemar"]["a_only"] == lost == sum(flip["lost"] for flip in document["flips"])


@pytest.mark.slow
def test_an_engine_an_onnx_file_and_a_checkpoint_of_one_net_agree(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0).eval()
    checkpoint.save_model(model, Path("net.pt"))
    export_onnx(model, Path("net.onnx"), IMGSZ, names=NAMES)
    OrtBackend.build(Path("net.onnx"), Path("engine"), "fp32")
    for b in ("net.onnx", "net.pt"):
        code, lines, err = called(capsys, "a=engine", f"b={b}", f"data={data}", "conf=0.001", "replicates=20")
        document = json.loads(lines[-1])
        assert code == 1, "a net that finds nothing keeps nothing"
        at, latency = document["operating"], document["latency"]
        assert at["agreement"]["matched"] > 0 and at["agreement"]["p05_iou"] > 0.999
        assert abs(at["score_shift"]["median"]) < 1e-5 and latency["low"] <= latency["ratio"] <= latency["high"]
        assert "ab: latency" in err
    code, lines, err = called(capsys, "a=engine", "b=net.pt", f"data={data}", "imgsz=96")
    assert code == 2 and "engine is 64x96 px, imgsz is 96x96 px" in err
    code, lines, err = called(capsys, "a=net.pt", "b=net.pt", f"data={data}")
    assert code == 2 and "two checkpoints take any size" in err
    data.write_text(data.read_text().replace("bolt, nut", "screw, nut"))
    code, lines, err = called(capsys, "a=engine", "b=net.pt", f"data={data}")
    assert code == 2 and "the model's classes are ['bolt', 'nut'], the data set's ['screw', 'nut']" in err


@pytest.mark.fault(65)
def test_other_images_other_detections_and_altered_bytes_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench(data.parent, data, image_set="0" * 64)
    words = [f"a={folder}:{ROWS[0]}", f"b={folder}:{ROWS[1]}", f"data={data}"]
    code, _, err = called(capsys, *words)
    assert code == 2 and "measured over image set 0000000000000000 (12 images), set.yaml has" in err
    folder = bench(data.parent, data, map50_95=0.5)
    code, _, err = called(capsys, f"a={folder}:{ROWS[0]}", f"b={folder}:{ROWS[1]}", f"data={data}")
    assert code == 5 and "the stored detections give mAP50-95 1.000000, but the row has 0.500000" in err
    table = folder / "detections" / f"{ROWS[1]}.npy"
    table.write_bytes(table.read_bytes()[:-4] + b"\0\0\0\0")
    code, _, err = called(capsys, f"a={folder}:{ROWS[0]}", f"b={folder}:{ROWS[1]}", f"data={data}")
    assert code == 5 and "its manifest says" in err


def test_what_names_no_model_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bench(data.parent, data)
    (data.parent / "empty").mkdir()
    good = f"b={folder}:{ROWS[1]}"
    for a, code, message in (
        ("gone", 2, "no engine folder, .onnx, .pt or BENCH:ROW of that name"),
        ("gone:row", 2, "gone is no bench artefact"),
        ("gone.pt", 2, "no such checkpoint"),
        ("gone.onnx", 2, "no engine folder"),
        (folder, 2, f"which row of the bench? {folder}:{ROWS[0]}"),
        (f"{folder}:original-torch-fp16", 2, "which row of the bench?"),
        (f"{folder}:compressed-tensorrt-int8", 2, "was not measured: no GPU"),
        ("empty", 5, "not an engine directory"),
    ):
        got, _, err = called(capsys, f"a={a}", good, f"data={data}")
        assert got == code and message in err, a
    code, _, err = called(capsys, f"a={folder}:{ROWS[0]}", good, "data=gone.yaml")
    assert code == 2 and "gone.yaml" in err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("margin=1.5", "margin: got '1.5', expected a number from 0 to 1"),
        ("margin=nan", "margin: got 'nan'"),
        ("conf=high", "conf: got 'high'"),
        ("replicates=0", "replicates: got '0', expected a whole number from 1 to 100000"),
        ("replicates=1.5", "replicates: got '1.5'"),
        ("seed=-1", "seed: got '-1'"),
        ("imgsz=100", "imgsz: got '100', expected one side or height,width, multiples of 32"),
        ("imgsz=64,96,128", "imgsz: got '64,96,128'"),
        ("imgsz=,64", "imgsz: got ',64'"),
        ("out=gone/found.json", "out: got 'gone/found.json', expected a file in a folder that exists"),
        ("qat.epochs=1", "ab takes no 'qat.epochs'"),
    ],
)
def test_settings_that_mean_nothing(
    word: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = called(capsys, "a=a.pt", "b=b.pt", "data=x.yaml", word)
    assert code == 2 and message in err


def test_two_models_and_data_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capsys, "a=x.pt", "data=d.yaml")
    assert code == 2 and "ab needs b; usage: yolo-compress ab a=MODEL b=MODEL data=DATA.yaml" in err
    assert ab.settings({"a": "x", "b": "y", "data": "z", "imgsz": "64,96"}).imgsz == (64, 96)
    assert ab.settings({"a": "x", "b": "y", "data": "z", "imgsz": "640"}).imgsz == (640, 640)


def test_an_artefact_of_another_stage_is_named_and_never_to_be_deleted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    key = {"stage": "engine", "version": 1, "inputs": {}}
    (store.partial("engine", fingerprint(key)) / "engines.json").write_text("[]")
    made = store.publish("engine", fingerprint(key), key, {}, {}, 1.0)
    with pytest.raises(RecipeError, match="an artefact of engine, not of bench; give an engine folder in it"):
        open_contender(str(made.path), tmp_path)
