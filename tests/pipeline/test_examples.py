"""examples/own_dataset.sh: from a data yaml to a bundle that its own robot commands accept."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.pipeline.conftest import IMGSZ, NAMES, Bench, draw

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    f"data.imgsz={IMGSZ}", "prune.epochs=1", "prune.close_mosaic=0", "prune.calib_images=8", "qat.epochs=0", "qat.calib_images=8",
    "engine.runtimes=onnxruntime", "bench.iterations=8", "bench.rounds=2", "bench.warmup=1", "report.min_retention=0.0",
    "report.ab_replicates=20", "run.threads=1",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_own_dataset_ends_with_a_bundle(finished: Bench, tmp_path: Path) -> None:
    draw(tmp_path / "mine", "train", 12, seed=2)
    draw(tmp_path / "mine", "val", 6, seed=3)
    data = {"path": "mine", "train": "images/train", "val": "images/val", "names": NAMES}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "yolo-compress"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -m yolo_compress "$@"\n')
    command.chmod(0o755)
    weights = finished.folder / "weights/tiny/baseline/model.pt"
    words = [ROOT / "examples/own_dataset.sh", "my.yaml", weights, "cpu", *SMALL]
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights" in yaml.safe_load((tmp_path / "my-recipe.yaml").read_text())["baseline"], (
        "the classes are the same"
    )
    assert (tmp_path / "robot.key.pub").is_file()
    with tarfile.open(tmp_path / "my.tar") as bundle:
        names = {Path(name).name for name in bundle.getnames()}
    assert {"manifest.json", "manifest.sig", "build.py", "detect.py", "int8.onnx"} <= names
