"""`yolo-compress predict`: its lines are the detector's, its last line says what it came to, and its exit codes are the house's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from yolo_compress.cli import predict
from yolo_compress.cli.main import main
from yolo_compress.errors import Terminated
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.backends.ort import ENGINE_FILE, OrtBackend
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.detect.stream import ImageDetections
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.errors import NotFinite
from yolo_compress.train import checkpoint

NAMES, IMGSZ = ("bolt", "nut", "screw"), (64, 96)
CONF = 0.001  # a net that was never trained is sure of nothing


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    export_onnx(checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0).eval(), folder / "net.onnx", IMGSZ, names=NAMES)
    OrtBackend.build(folder / "net.onnx", folder / "engine", "fp32")
    return folder / "engine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, (height, width) in enumerate([(48, 97), (64, 96), (30, 20), (100, 120)]):
        picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        picture.save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def called(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[Any], str]:
    """Exit code, the JSON lines of stdout, stderr."""
    code = main(["predict", *map(str, words)])
    out, err = capsys.readouterr()
    return code, [json.loads(row) for row in out.splitlines()], err


def test_lines_are_the_detectors(engine: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (*lines, summary), err = called(capsys, f"source={folder}", f"engine={engine}", f"conf={CONF}", "engines=2")
    files = sorted(folder.iterdir())
    assert code == 0 and [row["picture"] for row in lines] == list(map(str, files)) and "4/4 images" in err
    with open_engine(engine, threads=1) as backend:
        detector = Detector(backend, CONF, multi_label=False)
        for row, file in zip(lines, files, strict=True):
            image = read_image(file)
            expected = detector(image)
            assert (row["height"], row["width"]) == image.shape[:2] and len(row["detections"]) == len(expected) > 0
            boxes = [[*box["box"], box["score"], NAMES.index(box["class"])] for box in row["detections"]]
            assert np.allclose(boxes, expected, atol=0.02)
    assert summary["pictures"] == 4 and summary["unreadable"] == 0 and summary["ended_by"] is None
    assert summary["detections"] == sum(len(row["detections"]) for row in lines)
    assert summary["fps"] > 0 and summary["latency_p50_ms"] > 0 and summary["latency_n"] == 4
    assert summary["latency_p99_ms"] is None, "not from four pictures"


def test_lines_and_pictures_in_a_folder(engine: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    words = (f"source={folder}", f"engine={engine}", f"conf={CONF}", f"out={out}", "--draw")
    code, (summary,), _ = called(capsys, *words)
    lines = [json.loads(row) for row in (out / predict.LINES).read_text().splitlines()]
    assert code == 0 and summary["out"] == str(out) and [row["width"] for row in lines] == [97, 96, 20, 120]
    assert sorted(file.name for file in (out / predict.PICTURES).iterdir()) == [f"{i}.png.jpg" for i in range(4)]
    code, nothing, err = called(capsys, *words)
    assert code == 2 and not nothing and "exists, from an earlier call" in err


def test_files_left_out_by_their_ending_are_counted(
    engine: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.gif", "b.svg", "labels.txt"):
        (folder / name).write_bytes(b"x")
    code, (*lines, _), err = called(capsys, f"source={folder}", f"engine={engine}")
    assert code == 0 and len(lines) == 4
    assert f"{folder}: 2 files left out, because they have no image suffix (.gif 1, .svg 1)" in err


def test_a_corrupt_image_is_named_counted_and_an_error(
    engine: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:3000])
    code, (*lines, summary), err = called(capsys, f"source={folder}", f"engine={engine}")
    assert code == 3 and summary["pictures"] == 2 and summary["unreadable"] == 2
    assert [row["picture"][-5:] for row in lines if "problem" in row] == ["1.png", "3.png"]
    assert "1.png: no image that opencv can decode" in summary["first_unreadable"]
    assert "error: 2 of 4 images could not be read, the first: " in err and err.count("unreadable: ") == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["source=gone.jpg"], 3, "gone.jpg: no such file"),
        (["source=."], 3, "holds no image"),
        (["source=note.txt"], 3, "note.txt: OpenCV"),
        (["source=a.png", "engine=."], 5, "engine.json: No such file"),
        (["source=a.png", "engine=a.png"], 5, "not an engine directory"),
        (["source=a.png", "conf=high"], 2, "conf: got 'high', expected a number from 0 to 1"),
        (["source=a.png", "iou=1.5"], 2, "iou: got '1.5'"),
        (["source=a.png", "conf=nan"], 2, "conf: got 'nan'"),
        (["source=a.png", "engines=0"], 2, "engines: got '0', expected a whole number"),
        (["source=a.png", "draw=true"], 2, "draw=true needs a folder"),
        (["source=a.png", "out=note.txt"], 6, "note.txt"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str],
    code: int,
    message: str,
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("no picture")
    if words[0] == "source=a.png":
        Image.new("RGB", (20, 20)).save("a.png")
    if not any(word.startswith("engine=") for word in words):
        words = [*words, f"engine={engine}"]
    found, lines, err = called(capsys, *words)
    assert (found, lines) == (code, []) and message in err and "Traceback" not in err


def test_an_altered_engine_is_not_opened(
    engine: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in engine.iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    content = bytearray((altered / ENGINE_FILE).read_bytes())
    content[5000] ^= 1
    (altered / ENGINE_FILE).write_bytes(content)
    code, lines, err = called(capsys, f"source={folder}", f"engine={altered}")
    assert code == 5 and not lines and "(altered)" in err


@pytest.mark.parametrize(
    ("signal", "code", "word"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")]
)
def test_a_signal_ends_it_with_what_there_is_and_says_what_is_true(
    signal: type[BaseException],
    code: int,
    word: str,
    engine: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def line(found: ImageDetections, names: tuple[str, ...]) -> str:
        if found.name.endswith("2.png"):
            raise signal
        return "{}"

    monkeypatch.setattr(predict, "line", line)
    got, (*lines, summary), err = called(capsys, f"source={folder}", f"engine={engine}")
    assert got == code and summary["ended_by"] == word and summary["pictures"] == len(lines) == 2
    assert f"{word} after 2 images; the remaining images were not processed" in err and "continues" not in err
    out = folder.parent / "out"
    got, (summary,), err = called(capsys, f"source={folder}", f"engine={engine}", f"out={out}")
    assert got == code and summary["ended_by"] == word
    assert f"{word} after 2 images; their lines are in {out}; " in err and "continues" not in err
    assert len((out / predict.LINES).read_text().splitlines()) == 2


def test_nothing_more_is_detected_once_the_reader_left(
    engine: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(predict.progress, "result", lambda text: bool(written.append(text)))
    chosen = predict.settings({"source": str(folder), "engine": str(engine)})
    assert predict.run(chosen)["pictures"] == 0 and len(written) == 1


def test_numbers_that_are_none_are_told_apart_from_a_bad_file(
    engine: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*_: object) -> None:
        raise NotFinite("the network's output holds NaN")

    monkeypatch.setattr(Detector, "found", found)
    code, lines, err = called(capsys, f"source={folder}", f"engine={engine}")
    assert code == 7 and not lines and "0.png: the network's output holds NaN" in err
