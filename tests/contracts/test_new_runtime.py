"""A new runtime needs a row in `runtime/registry.py` and a file in `runtime/backends/`. It then appears everywhere."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "yolo_compress"
ROW = """        Runtime(
            name="echo",
            title="Echo",
            about="Echo 1.0, CPU",
            package="onnxruntime",
            needs="echo",
            backend="backends.echo:EchoBackend",
            int8=(Int8File("int8-echo", "echo", "Echo", "echo", 0),),
            opsets=(7, 28),
        ),
"""
NAMES = {"onnxruntime", "openvino", "tensorrt"}
# Files that name a runtime, and the reason.
MAY_NAME = {
    "runtime/registry.py": "the list",
    "runtime/commands/build.py": "a Jetson's message",
    "recipe/sections.py": "the default of prune.latency_runtime",
    "cli/verbs.py": "the default target of lint",
    "lint/": "rules of TensorRT's versions, and of what one runtime alone does",
    "bundle/targets/triton.py": "Triton's own name of its backend",
    "report/zeros.py": "what each runtime makes of zeros among the weights",
    "stages/report.py": "the advice to measure on TensorRT",
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with an additional runtime."""
    root = tmp_path_factory.mktemp("scratch")
    shutil.copytree(PACKAGE, root / "yolo_compress", ignore=shutil.ignore_patterns("__pycache__"))
    registry = root / "yolo_compress/runtime/registry.py"
    text = registry.read_text()
    first = text.index("        Runtime(\n")
    registry.write_text(text[:first] + ROW + text[first:])
    backends = root / "yolo_compress/runtime/backends"
    text = (backends / "ort.py").read_text()
    for old, new in (
        ("OrtBackend", "EchoBackend"),
        ('RUNTIME = "onnxruntime"', 'RUNTIME = "echo"'),
        ('return "onnxruntime"', 'return "echo"'),
    ):
        assert text.count(old) >= 1
        text = text.replace(old, new)
    (backends / "echo.py").write_text(text)
    return root


def stdout_of(scratch: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(scratch), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *words], cwd=scratch, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_check_and_recipe_offer_it(scratch: Path) -> None:
    assert "echo" in stdout_of(scratch, "-m", "yolo_compress", "help", "engine")
    assert "echo" in stdout_of(scratch, "-m", "yolo_compress", "help", "prune")
    assert "echo" in stdout_of(scratch, "-m", "yolo_compress", "cfg", "recipe=digits", "engine.runtimes=echo")
    assert "echo" in stdout_of(scratch, "-m", "yolo_compress", "check")


PROGRAM = """
import json
from yolo_compress.store import environment
from yolo_compress.bundle.make import README
from yolo_compress.export.qdq import FORMS
from yolo_compress.evaluate.exported_files import made_for
from yolo_compress.lint.targets import CPU, TARGETS
from yolo_compress.quant.saturation import saturates
from yolo_compress.report import numbers
from yolo_compress.runtime.commands.build import choose_runtimes
from yolo_compress.runtime.commands.bundle import PREFERENCE
from yolo_compress.runtime.engine import BACKENDS, onnx_forms
print(json.dumps({
    "check": environment.ENGINE_PACKAGES["echo"],
    "int8 file": FORMS["echo"].stem,
    "row of the report": made_for("compressed/int8-echo.onnx")[0],
    "title": numbers.runtime("echo"),
    "lint": TARGETS["echo"].about,
    "lint for CPUs": "echo" in CPU,
    "robot": "echo" in choose_runtimes(None) and "echo" in PREFERENCE[0],
    "engine": BACKENDS["echo"].__name__,
    "model of its engine": onnx_forms(["fp32", "int8", "int8-echo"], "echo", "int8"),
    "builds and runs": saturates("echo") in (True, False),
}))
"""


def test_it_is_in_every_list_of_runtimes(scratch: Path) -> None:
    assert json.loads(stdout_of(scratch, "-c", PROGRAM).splitlines()[-1]) == {
        "check": "onnxruntime",
        "int8 file": "int8-echo",
        "row of the report": "echo",
        "title": "Echo",
        "lint": "Echo 1.0, CPU",
        "lint for CPUs": True,
        "robot": True,
        "engine": "EchoBackend",
        "model of its engine": ["int8-echo"],
        "builds and runs": True,
    }


def test_no_other_file_names_a_runtime() -> None:
    strangers = set()
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith("runtime/backends/") or any(name.startswith(known) for known in MAY_NAME):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        strangers |= {
            f"{name}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in NAMES
        }
    assert not strangers
