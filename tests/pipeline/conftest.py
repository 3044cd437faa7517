"""A working folder with a few images and a recipe of the whole chain that runs in about a minute.

Real blood cells where YOLO_COMPRESS_DATA and YOLO_COMPRESS_WEIGHTS have them, drawn digits otherwise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from yolo_compress.datasets.digits import draw

ROOT = Path(__file__).resolve().parents[2]
IMGSZ = 96


@dataclass(frozen=True)
class Bench:
    """A working folder: `run` calls the command line in it as a user would."""

    folder: Path

    def run(self, *words: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "yolo_compress", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", **environment},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert code is None or done.returncode == code, (
            f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "yolo_compress", *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )

    def artefacts(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "weights" / "store").glob("*-*"))


def real_data() -> tuple[Path, Path] | None:
    """(yaml, checkpoint) of the blood cells, where they are."""
    for folder in filter(None, os.environ.get("YOLO_COMPRESS_DATA", "").split(os.pathsep)):
        for weights in filter(None, os.environ.get("YOLO_COMPRESS_WEIGHTS", "").split(os.pathsep)):
            data, checkpoint = Path(folder) / "bccd.yaml", Path(weights) / "yolov8n_bccd.pt"
            if data.is_file() and checkpoint.is_file():
                return data, checkpoint
    return None


def recipe(folder: Path, name: str = "tiny", **sections: object) -> Path:
    """Write a recipe; a section given replaces the usual one, None drops it."""
    given = real_data()
    usual: dict[str, object] = {
        "data": {"yaml": str(given[0]) if given else "digits.yaml", "imgsz": IMGSZ, "limit_train": 24, "limit_val": 8},
        "baseline": {"weights": str(given[1])} if given else {"epochs": 4, "batch": 8, "warmup_epochs": 1.0},
        "sparsify": {"epochs": 1, "batch": 8},
        "prune": {"epochs": 2, "batch": 8, "keep_flops": 0.7, "calib_images": 16, "teach_from_parent": True},
        "distill": {"epochs": 1, "batch": 8},
        "qat": {"epochs": 1, "batch": 8, "calib_images": 8},
        "export": {"calib_images": 8},
        "engine": {},
        "bench": {"iterations": 20, "rounds": 2, "warmup": 2},
        "report": {"min_retention": 0.0, "images": 4},
    }
    usual.update(sections)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in usual.items() if value is not None}))
    return path


def prepare(folder: Path) -> Bench:
    """Digits (where there are no real images) and the tiny recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").mkdir()
    if real_data() is None:
        draw(folder / "datasets" / "digits", train=24, val=8, imgsz=IMGSZ)
    recipe(folder)
    return Bench(folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return prepare(tmp_path / "user")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder in which the whole chain has run once."""
    ready = prepare(tmp_path_factory.mktemp("chain") / "user")
    gate = ready.run("run", "recipe=tiny.yaml", code=None)
    assert gate.returncode in (0, 1), gate.stderr  # 1: digits trained this briefly detect nothing, so nothing is kept
    return ready
