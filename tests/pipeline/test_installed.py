"""The package as a user installs it: a wheel, built from the sdist, at work in an empty folder outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "yolo_compress"
BUILD = """
import os, sys, tarfile
from setuptools import build_meta

out = sys.argv[1]  # setuptools changes sys.argv
sdist = os.path.join(out, build_meta.build_sdist(out))
with tarfile.open(sdist) as archive:
    archive.extractall(out, filter="data")
os.chdir(sdist.removesuffix(".tar.gz"))
print(build_meta.build_wheel(out))
"""
# The command line, in a process that ends when it opens a file of the checkout (the environment may lie in there).
WATCHED = """
import os, runpy, sys

def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith(CHECKOUT + os.sep) and not path.startswith(sys.prefix + os.sep):
            os.write(2, f"opened {path}\\n".encode())
            os._exit(99)

CHECKOUT = sys.argv.pop(1)
sys.addaudithook(watch)
runpy.run_module("yolo_compress", run_name="__main__", alter_sys=True)
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def files(folder: Path) -> dict[str, str]:
    """Digest of each file that is no compiled module, by its name."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in found}


@dataclass(frozen=True)
class Installed:
    """A folder with the unpacked wheel, and a user's folder, empty at first."""

    wheel: Path
    user: Path

    def __call__(self, *words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("YOLO_COMPRESS")}
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", WATCHED, str(ROOT), *words],
            cwd=self.user,
            env={**kept, "PYTHONPATH": str(self.wheel), "PYTHONDONTWRITEBYTECODE": "1", **variables},
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, of a copy of the sources, since building writes beside them."""
    work = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work)
    shutil.copytree(PACKAGE, work / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, str(work / "dist")],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(work / "dist" / done.stdout.split()[-1]) as archive:
        archive.extractall(work / "site")
    return work / "site"


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Iterator[Installed]:
    (tmp_path / "user").mkdir()
    before = files(wheel)
    yield Installed(wheel, tmp_path / "user")
    assert files(wheel) == before, "something was written beside the code"


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    assert files(wheel / PACKAGE.name) == files(PACKAGE)
    (metadata,) = wheel.glob("*.dist-info")
    assert (metadata / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "yolo-compress = yolo_compress.cli.main:main" in (metadata / "entry_points.txt").read_text()


def test_a_read_of_the_checkout_would_be_seen(installed: Installed) -> None:
    assert f"opened {ROOT}" in installed("help", code=99, PYTHONPATH=str(ROOT)).stderr


def test_digits_in_an_empty_folder(installed: Installed) -> None:
    assert "usage: " in installed("help").stdout
    assert "yaml: digits.yaml" in installed("cfg", "recipe=digits").stdout
    assert list(installed.user.iterdir()) == [], "neither writes anything"
    few = ("recipe=digits", "data.limit_train=16", "data.limit_val=8")
    said = installed("check", *few)
    drawn = "digits: drawing 600 training and 150 validation images of 128 px into datasets/digits"
    assert said.stderr.splitlines() == [drawn]
    assert f"{installed.wheel}/yolo_compress/data/shipped/digits.yaml: 16 train, 8 val, 10 classes" in said.stdout
    said = installed("baseline", *few, "baseline.epochs=1", "baseline.close_mosaic=0", "baseline.warmup_epochs=0")
    answer = json.loads(said.stdout.splitlines()[-1])
    assert drawn not in said.stderr
    assert answer["artifact"].startswith("weights/store/baseline-")
    assert (installed.user / "weights/digits/baseline/model.pt").is_file()
    assert sorted(path.name for path in installed.user.iterdir()) == ["datasets", "weights"]
    assert sorted(path.name for path in (installed.user / "datasets").iterdir()) == ["digits", "digits.lock"]


def test_with_a_home_the_working_folder_stays_empty(installed: Installed) -> None:
    home = installed.user.parent / "home"
    installed("gc", YOLO_COMPRESS_HOME=str(home))
    assert [path.name for path in home.iterdir()] == ["weights"] and list(installed.user.iterdir()) == []
