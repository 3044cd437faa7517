"""Working folders with a few images and a recipe of the whole chain.

`finished` is a folder in which the chain has run once, from a baseline trained here until it finds what it is asked for: large
squares and discs, which take it 120 steps (digits take it 1,000). `bench` is a folder in which nothing has run, with an
untrained baseline, for what does not depend on what a net finds.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from tests.support.given import find
from yolo_compress.cli.main import main
from yolo_compress.train import checkpoint

ROOT = Path(__file__).resolve().parents[2]
IMGSZ = 64
NAMES = ["square", "disc"]
WITHOUT_MOSAIC = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0}
BASELINE = {
    "model": "yolov8n.yaml", "epochs": 20, "batch": 4, "optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 1.0, "cosine": True,
    **WITHOUT_MOSAIC,
}  # mAP50-95 0.75  # fmt: skip
UNTRAINED = {"weights": "untrained.pt"}


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    returncode: int
    stdout: str
    stderr: str

    def ended_with(self, code: int) -> Answer:
        assert self.returncode == code, f"exit {self.returncode}, expected {code}\n{self.stdout}\n{self.stderr}"
        return self


@dataclass(frozen=True)
class Bench:
    """A working folder, and the command line called in it."""

    folder: Path

    def run(self, *words: str, code: int = 0) -> Answer:
        """In this process: another would import torch first."""
        stdout, stderr, on_sigterm = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            warnings.catch_warnings(action="ignore"),
        ):
            try:
                returncode = main(list(words))
            finally:
                signal.signal(signal.SIGTERM, on_sigterm)  # which `main` answers: the next tests are no command
        return Answer(returncode, stdout.getvalue(), stderr.getvalue()).ended_with(code)

    def run_apart(self, *words: str, code: int = 0) -> Answer:
        """As `run`, in a process of its own, as a user does it."""
        process = self.start(*words)
        stdout, stderr = process.communicate(timeout=800)
        return Answer(process.returncode, stdout, stderr).ended_with(code)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A process that can be killed."""
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "yolo_compress", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )

    def namesake(self, name: str) -> str:
        """The word for the tiny recipe under another name: what it makes leaves the friendly names of tiny as they are."""
        shutil.copyfile(self.folder / "tiny.yaml", self.folder / f"{name}.yaml")
        return f"recipe={name}.yaml"

    def artefacts(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "weights" / "store").glob("*-*"))


def recipe(folder: Path, name: str = "tiny", **sections: object) -> Path:
    """Write a recipe; a section given replaces the usual one, None drops it."""
    usual: dict[str, object] = {
        "data": {"yaml": "shapes.yaml", "imgsz": IMGSZ, "limit_train": 24, "limit_val": 8},
        "baseline": UNTRAINED,
        "sparsify": {"epochs": 1, "batch": 8, "lr0": 0.0005},
        "prune": {
            "epochs": 2,
            "batch": 8,
            "lr0": 0.0005,
            "keep_flops": 0.7,
            "calib_images": 16,
            "teach_from_parent": True,
        },
        "distill": {"epochs": 1, "batch": 8, "lr0": 0.0005},
        "qat": {"epochs": 1, "batch": 8, "calib_images": 8},
        "export": {"calib_images": 8},
        "engine": {},
        "bench": {"iterations": 20, "rounds": 2, "warmup": 2},
        "control": {},
        "report": {"min_retention": 0.0, "images": 4},
    }
    usual.update(sections)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in usual.items() if value is not None}))
    return path


def draw(folder: Path, split: str, count: int, seed: int) -> None:
    """Images of one shape each, 40 to 70 % of their side, on dark noise, and their labels."""
    generator = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True)
    for number in range(count):
        image = Image.fromarray(generator.integers(0, 60, (IMGSZ, IMGSZ, 3), dtype=np.uint8))
        side = int(generator.integers(round(0.4 * IMGSZ), round(0.7 * IMGSZ)))
        x, y = (int(corner) for corner in generator.integers(0, IMGSZ - side, 2))
        box, pen = (x, y, x + side - 1, y + side - 1), ImageDraw.Draw(image)
        if disc := int(generator.integers(0, 2)):
            pen.ellipse(box, fill=(230, 200, 40))
        else:
            pen.rectangle(box, fill=(60, 120, 240))
        image.save(folder / "images" / split / f"{number:02d}.png")
        row = [disc, *(value / IMGSZ for value in (x + side / 2, y + side / 2, side, side))]
        (folder / "labels" / split / f"{number:02d}.txt").write_text(" ".join(map(str, row)) + "\n")


def prepare(folder: Path, **sections: object) -> Bench:
    """24 training and 8 validation images, an untrained net that knows their classes, and the tiny recipe."""
    draw(folder / "datasets" / "shapes", "train", 24, seed=0)
    draw(folder / "datasets" / "shapes", "val", 8, seed=1)
    data = {"path": "shapes", "train": "images/train", "val": "images/val", "names": NAMES}
    (folder / "datasets" / "shapes.yaml").write_text(yaml.safe_dump(data))
    (folder / "weights").mkdir()
    checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0), folder / "weights" / UNTRAINED["weights"])
    recipe(folder, **sections)
    return Bench(folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return prepare(tmp_path / "user")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The whole chain, from a baseline trained here."""
    ready = prepare(tmp_path_factory.mktemp("chain") / "user", baseline=BASELINE)
    ready.run_apart("run", "recipe=tiny.yaml")
    return ready


@pytest.fixture(scope="session")
def on_blood_cells(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The whole chain on real images, from a checkpoint that was trained on their like."""
    data = {"yaml": str(find("YOLO_COMPRESS_DATA", "bccd.yaml")), "imgsz": IMGSZ, "limit_train": 24, "limit_val": 8}
    baseline = {"weights": str(find("YOLO_COMPRESS_WEIGHTS", "yolov8n_bccd.pt"))}
    ready = prepare(tmp_path_factory.mktemp("real") / "user", data=data, baseline=baseline)
    ready.run_apart("run", "recipe=tiny.yaml")
    return ready


@pytest.fixture(scope="session", params=["finished", pytest.param("on_blood_cells", marks=pytest.mark.real)])
def chain(request: pytest.FixtureRequest) -> Bench:
    """Each finished chain in turn."""
    return request.getfixturevalue(request.param)
