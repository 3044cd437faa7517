"""Data that crosses a package has a type: a `dict[str, Any]` stays only where JSON or YAML comes in and is checked there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "yolo_compress"
UNTYPED = re.compile(r"\b(dict|Mapping|Dict)\[str, Any\]")

# File -> lines that may hold such a type. Lower a number when it falls; a new file needs a reason beside it.
DOORS = {
    "files/strict_json.py": 1,  # any JSON file
    "files/strict_yaml.py": 1,  # any YAML file
    "recipe/recipe.py": 6,  # a recipe, before pydantic has checked it
    "recipe/auto_values.py": 1,  # a section's knobs, `auto` among them
    "rollout/judge.py": 1,  # budgets from the command line
    "runtime/backends/coreml.py": 1,  # outputs by name, as the library takes them
    "runtime/backends/coreml_program.py": 1,  # values of coremltools' builder
    "runtime/backends/onnx_graph.py": 1,  # attributes of a node
    "runtime/engine.py": 1,  # the backends by name: classes, not data
    "runtime/json_text.py": 1,  # any JSON text
    "stages/__init__.py": 1,  # what a killed run left in `work`
    "store/fingerprint.py": 1,  # the JSON copy of any key or metrics
    "store/manifest.py": 3,  # key and metrics of any stage, as on the disk; `stages.metrics` has the types
    "train/trainer.py": 3,  # Ultralytics' own signature; the content of resume.pt
    "train/transfer.py": 1,  # the layers of a foreign checkpoint
}
# Packages that are not done; only fewer lines may hold such a type than do now.
REST = {
    "cli/": 7,
    "distill/": 4,
    "lint/": 4,
    "pipeline.py": 1,
    "progress.py": 3,
    "prune/": 5,
    "quant/": 7,
    "report/": 2,
}


def lines() -> Counter[str]:
    """How many lines of each file hold such a type."""
    found: Counter[str] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        count = sum(bool(UNTYPED.search(line)) for line in file.read_text(encoding="utf-8").splitlines())
        if count:
            found[file.relative_to(PACKAGE).as_posix()] = count
    return found


def place(name: str) -> str:
    """The entry of `DOORS` or `REST` that a file counts for; itself where there is none."""
    return next((key for key in (*DOORS, *REST) if name == key or (key.endswith("/") and name.startswith(key))), name)


def test_only_doors_hold_untyped_mappings() -> None:
    found: Counter[str] = Counter()
    for name, count in lines().items():
        found[place(name)] += count
    allowed = {**DOORS, **REST}
    more = {name: count for name, count in found.items() if count > allowed.get(name, 0)}
    assert not more, f"more lines with dict[str, Any] than allowed: {more}; give the data a TypedDict or a dataclass"


def test_doors_are_few_and_in_use() -> None:
    assert sum(DOORS.values()) <= 24
    there = {place(name) for name in lines()}
    assert set(DOORS) <= there, f"doors that are no more: {sorted(set(DOORS) - there)}"


def test_what_is_counted() -> None:
    assert UNTYPED.search("def f(a: dict[str, Any]) -> None:") and UNTYPED.search("x: Mapping[str, Any] | None")
    assert UNTYPED.search("Dict[str, Any]") and not UNTYPED.search("MyDict[str, int]")
