"""examples/: each program does what its first lines say. `own_dataset.sh` runs a chain: tests/pipeline/test_examples.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tests.support.noise_set import draw
from tests.support.pages import ROOT, blocks
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.prune import criteria, graph
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.engine import open_engine
from yolo_compress.train import checkpoint

NAMES, IMGSZ = ("bolt", "nut"), (64, 64)
EXAMPLES = ROOT / "examples"


def test_detect_prints_what_the_detector_finds(tmp_path: Path) -> None:
    model = checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0).eval()
    with torch.no_grad():  # as if it were trained: half of the anchors are sure of something
        for branch in model.model[-1].cv3:
            branch[-1].bias[:] = torch.tensor([1.0, -4.0])
    export_onnx(model, tmp_path / "net.onnx", IMGSZ, names=NAMES)
    OrtBackend.build(tmp_path / "net.onnx", tmp_path / "engine", "fp32")
    draw(tmp_path / "images", 2)
    files = sorted((tmp_path / "images").iterdir())
    done = subprocess.run(
        [sys.executable, EXAMPLES / "detect.py", tmp_path / "engine", *files],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == list(map(str, files))
    with open_engine(tmp_path / "engine") as engine:
        detector = Detector(engine, conf=0.25, multi_label=False)
        for row, file in zip(rows, files, strict=True):
            expected = detector(read_image(file))
            found = [[*one["box"], one["score"], NAMES.index(one["class"])] for one in row["detections"]]
            assert len(found) > 0 and np.allclose(found, expected, atol=0.06)
    wrong = subprocess.run([sys.executable, EXAMPLES / "detect.py"], capture_output=True, text=True, check=False,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert wrong.returncode == 1 and wrong.stderr.startswith("usage: ")


def test_the_custom_criterion_ranks_channels() -> None:
    criterion = criteria.find(f"{EXAMPLES / 'custom_criterion.py'}:widest_spread")
    model = checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0)
    groups = graph.prunable(model)
    first = next(group for group in groups if group.name == "model.0")
    weight = model.model[0].conv.weight
    with torch.no_grad():
        weight[5] = 0.25  # a filter without any spread
        weight[7] *= 100
    score_C = criterion(Evidence(model, groups), first)
    assert score_C.shape == (16,) and torch.allclose(score_C, weight.detach().flatten(1).std(1))
    assert score_C.argmin() == 5 and score_C[5] == 0 and score_C.argmax() == 7
    scores = criteria.scores(Evidence(model, groups), criterion)
    assert {name: len(score) for name, score in scores.items()} == {group.name: group.width for group in groups}


def test_the_docs_print_the_same_criterion() -> None:
    shown = [block.text for block in blocks(ROOT / "docs/pruning.md", "python") if "def widest_spread" in block.text]
    assert shown and shown[0] in (EXAMPLES / "custom_criterion.py").read_text(encoding="utf-8")
