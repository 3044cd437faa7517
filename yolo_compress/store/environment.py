"""Describe the machine and the library versions for manifests and the report. None of these libraries is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from typing_extensions import TypedDict

from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.runtime.registry import RUNTIMES

ENGINE_PACKAGES = {row.name: row.package for row in RUNTIMES.values()}
PACKAGES = (
    "yolo-compress",
    "torch",
    "ultralytics",
    "nvidia-modelopt",
    "onnx",
    "onnxsim",
    *ENGINE_PACKAGES.values(),
    "pycocotools",
)


class Environment(TypedDict, total=False):
    """Versions, processor and operating system, as `describe` returns them.

    Null means unknown. A manifest of an earlier version of this package may lack a key.
    """

    python: str  # version of Python
    platform: str  # "Linux x86_64"
    cpu: str  # name of the processor
    cores: int | None
    memory_gib: float
    commit: str | None  # result of `commit`
    packages: dict[str, str]  # distribution -> version, for the installed ones of `PACKAGES`


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> Environment:
    """Return versions, processor and operating system. The result names no user, host or path."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "commit": commit(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
    }


def memory_bytes() -> int:
    """Return the physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def commit() -> str | None:
    """Return the git commit that this code runs from, with `+` if files were changed, or the words "not a checkout".

    None: git does not answer.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "not a checkout"
    try:
        revision = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
