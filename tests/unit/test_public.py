"""What a user's program imports: complete, described, typed, and nothing imported before it is used."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import yolo_compress

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["Artifact", "Detector", "Recipe", "load", "open_engine", "run"]

GOOD = """
from pathlib import Path

import numpy as np

from yolo_compress import Artifact, Detector, Recipe, load, open_engine, run

recipe: Recipe = load("digits", [("prune.keep_flops", "0.6")])
seed: int = recipe.run.seed
artifact: Artifact = run(recipe, "report", wait=False)
html: Path = artifact.file("report.html")
with open_engine(artifact.path, threads=1) as engine:
    classes: tuple[str, ...] = engine.names
    detector = Detector(engine, conf=0.25, multi_label=False)
    for x1, y1, x2, y2, score, label in detector(np.zeros((64, 48, 3), np.uint8)):
        print(classes[int(label)], float(score))
"""
BAD = """
import yolo_compress

yolo_compress.load(5)
yolo_compress.run("digits", "report")
yolo_compress.open_engine("engine", thread=1)
yolo_compress.Detector(None)
yolo_compress.nothing
"""


def test_every_name_is_there_and_described() -> None:
    assert [name for name in yolo_compress.__all__ if not name.startswith("_")] == NAMES
    assert set(NAMES) <= set(dir(yolo_compress))
    for name in NAMES:
        assert inspect.getdoc(getattr(yolo_compress, name)), name
    for call in (yolo_compress.load, yolo_compress.run, yolo_compress.open_engine, yolo_compress.Detector.__call__):
        text = inspect.getdoc(call) or ""
        assert all(f"\n{part}:\n" in text for part in ("Args", "Returns", "Raises")), call
        untyped = [name for name in inspect.signature(call).parameters if name not in {"self", *call.__annotations__}]
        assert not untyped and "return" in call.__annotations__, call
    with pytest.raises(AttributeError, match="'yolo_compress' has no attribute 'nothing'"):
        _ = yolo_compress.nothing  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_of_it() -> None:
    program = (
        "import sys, yolo_compress; print(*sorted(name for name in sys.modules if name.startswith('yolo_compress')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["yolo_compress"]


@pytest.mark.slow
def test_a_users_program_is_type_checked(tmp_path: Path) -> None:
    assert (ROOT / "yolo_compress/py.typed").is_file()
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    command += ["--no-error-summary", "--config-file=", "good.py", "bad.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[:2] for line in found] == [["bad.py", str(number)] for number in (4, 5, 6, 7, 8)], done
