"""One class, a few images of odd sizes in odd folders: from the data set to what the robot's commands find."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.pipeline.conftest import Bench, recipe
from yolo_compress.data.dataset import load
from yolo_compress.train.checkpoint import load_model
from yolo_compress.train.validate import validate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = 'it\'s a "bin" <箱>'
SIZES = ((64, 64), (96, 64), (48, 64), (128, 96), (20, 30), (640, 480), (400, 60), (64, 64))  # width, height in px
VAL = 4


def draw(root: Path) -> dict[str, object]:
    """A bright square an image, in nested folders with spaces and letters of elsewhere, .JPG and .png, labels with CRLF."""
    generator = np.random.default_rng(0)
    for split, sizes in (("train", SIZES), ("val", SIZES[:VAL])):
        for number, (width, height) in enumerate(sizes):
            folder = f"{split}/Tag {number % 2} ü"
            for kind in ("images", "labels"):
                (root / kind / folder).mkdir(parents=True, exist_ok=True)
            image = generator.integers(40, 70, (height, width, 3), np.uint8)
            side = generator.uniform(0.4, 0.6) * min(width, height)
            x, y = generator.uniform(side / 2, width - side / 2), generator.uniform(side / 2, height - side / 2)
            image[int(y - side / 2) : int(y + side / 2), int(x - side / 2) : int(x + side / 2)] = 230, 200, 60
            stem = f"#{number} {split}"
            suffix = "JPG" if number % 2 else "png"
            Image.fromarray(image).save(root / "images" / folder / f"{stem}.{suffix}", quality=95)
            row = f"0 {x / width:.6f} {y / height:.6f} {side / width:.6f} {side / height:.6f}\r\n"
            (root / "labels" / folder / f"{stem}.txt").write_bytes(row.encode())
    listed = sorted((root / "images" / "train").rglob("*.*g")) + sorted((root / "images" / "train").rglob("*.JPG"))
    (root / "train list.txt").write_bytes("".join(f"./{path.relative_to(root)}\r\n" for path in listed).encode())
    return {"path": str(root), "train": "train list.txt", "val": "images/val", "names": [NAME]}


@pytest.fixture(params=["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    """The whole chain, run. All images are one batch, so an epoch is one step."""
    end_to_end = request.param == "yolo26n.yaml"
    folder = tmp_path / "user's"
    folder.mkdir()
    (folder / "weights").mkdir()
    data = draw(folder / "data é")
    (folder / "my data.yaml").write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    training = {"batch": 16, "mosaic": 0.0, "close_mosaic": 0, "warmup_epochs": 0.0}
    recipe(
        folder,
        data={"yaml": "my data.yaml", "imgsz": 64},
        run={"threads": 1},
        baseline={
            **training,
            "model": request.param,
            "lr0": 0.002,
            "cosine": True,
            "epochs": 120 if end_to_end else 50,
        },
        sparsify=None,
        prune={**training, "epochs": 4, "keep_flops": 0.8, "calib_images": 64, "teach_from_parent": False},
        distill={**training, "epochs": 2},
        qat={**training, "epochs": 1, "calib_images": 64, "lr0": 1e-5},
        export={"calib_images": 64, "nms": not end_to_end, "torchscript": False, "precisions": ["fp32", "int8"]},
        engine={"runtimes": ["onnxruntime", "openvino", "ncnn"] if end_to_end else ["onnxruntime"]},
        bench={"iterations": 8, "rounds": 1, "warmup": 1},
        report={"min_retention": 0.0, "images": 2, "ab_replicates": 20},
    )
    ready = Bench(folder)
    said = ready.run("run", "recipe=tiny.yaml").stderr
    assert f"calibration: all {len(SIZES)} training images, fewer than the 64 of calib_images" in said
    return ready


def robot(bench: Bench, command: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(bench.folder / "bundle" / command), *words],
        capture_output=True, text=True, timeout=200, check=False, cwd=bench.folder,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_from_images_to_the_robot(bench: Bench, request: pytest.FixtureRequest) -> None:
    report = json.loads((bench.folder / "weights/tiny/report/report.json").read_text(encoding="utf-8"))
    rows = {row["id"]: row for row in report["rows"]}
    baseline, int8 = rows["original-torch-fp32"], rows["compressed-onnxruntime-int8"]
    assert report["data"]["names"] == [NAME] and report["data"]["train_images"] == len(SIZES)
    assert baseline["map50_95"] > 0.2, "eight images are learnt, and BatchNorm follows"
    assert report["gate"]["passed"] and baseline["per_class"] == {NAME: baseline["map50_95"]}
    architecture = request.node.callspec.params["bench"]
    # convolutions before attention compute in float
    assert f"{ {'yolov8n.yaml': 57, 'yolo11n.yaml': 78, 'yolo26n.yaml': 90}[architecture] } int8" in int8["executed"], (
        "every convolution of the plan, with one class as with many"
    )
    page = (bench.folder / "weights/tiny/report/report.html").read_text(encoding="utf-8")
    assert "&lt;箱&gt;" in page and "<箱>" not in page

    dataset = load(str(bench.folder / "my data.yaml"))
    printed = validate(load_model(bench.folder / "weights/tiny/baseline/model.pt"), dataset, 64)
    # Ultralytics does not clip boxes at the border of the image; in four images one box over the border is worth 0.02
    assert baseline["map50_95_ultralytics"] == pytest.approx(printed["map50_95"], abs=0.05), "what `yolo val` prints"

    bench.run("bundle", "recipe=tiny.yaml", "out=bundle", "version=1")
    manifest = json.loads((bench.folder / "bundle/manifest.json").read_text(encoding="utf-8"))
    assert manifest["names"] == [NAME] and ("onnx/fp32-nms.onnx" in manifest["files"]) == (
        architecture != "yolo26n.yaml"
    )
    assert set(manifest["onnx"]) == {"fp32", "int8", "int8-tensorrt11", "int8-onnxruntime", "int8-openvino"}

    val = bench.folder / "val"
    for kind in ("images", "labels"):
        shutil.copytree(bench.folder / "data é" / kind / "val", val / kind)
    robot(bench, "build.py", "--runtime", "onnxruntime", "--precision", "int8")
    last = robot(bench, "bench.py", "--data", str(val), "--iterations", "8", "--power-s", "0.1").splitlines()[-1]
    assert json.loads(last)["golden"]["passed"]
    device = json.loads((bench.folder / "bundle/device.json").read_text(encoding="utf-8"))
    (row,) = (row for row in device["rows"] if row["status"] == "ok")
    assert (row["runtime"], row["precision"]) == ("onnxruntime", "int8") and row["image_set"] == int8["image_set"]
    assert row["map50_95"] == pytest.approx(int8["map50_95"], abs=1e-4)

    robot(bench, "detect.py", str(val / "images" / "Tag 0 ü"), "--draw", "drawn", "--shadow", "shadow.jsonl", "--quiet")
    frames = [json.loads(line) for line in (bench.folder / "shadow.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(frames) == VAL // 2 == len(list((bench.folder / "drawn").iterdir()))
    assert all(int(found[5]) == 0 for frame in frames for found in frame["detections"])
