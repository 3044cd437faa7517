"""`yolo-compress check`: packages, devices and disk of this machine, and the data set."""

from __future__ import annotations

import json
from pathlib import Path

from yolo_compress import home, preflight
from yolo_compress.cli.grammar import Command
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.files.atomic import free_mib
from yolo_compress.progress import result
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.store import environment
from yolo_compress.store.resources import FREE_MIB
from yolo_compress.store.store import Store

NEEDED = ("torch", "ultralytics", "nvidia-modelopt", "onnx", "onnxsim", "pycocotools")


def handle(command: Command) -> int:
    """Print the packages, devices and disk space of this machine. If a data set is named, also print its contents.

    Raises:
        EnvironmentLacks: A package or disk space is missing. It is raised last, after everything is printed.
    """
    facts, lacks = machine()
    for name, text in facts.items():
        result(f"{name:<12} {text}")
    document: dict[str, object] = {"machine": facts, "lacks": lacks}
    if command.names_recipe:
        recipe, dataset = preflight.prepare(command.load(), Store(home.weights()))
        counts = f"{len(dataset.train)} train, {len(dataset.val)} val, {len(dataset.names)} classes"
        result(f"{'data':<12} {dataset.yaml}: {counts}")
        for note in [*dataset.notes, *dataset.skipped]:
            result(f"{'':<12} {note}")
        document = {"recipe": recipe.name, "machine": facts, "data": dataset.digest, "lacks": lacks}
    else:
        result(f"{'data':<12} not checked; add data.yaml=my.yaml to check it too")
    result(json.dumps(document))
    if lacks:
        raise EnvironmentLacks("; ".join(lacks))
    return 0


def machine() -> tuple[dict[str, str], list[str]]:
    """Return properties of this machine (name -> text), and one line for each missing thing, with its remedy."""
    lacks = [
        f"{name} is not installed: `make setup` in a checkout, else `pip install {name}`"
        for name in NEEDED
        if environment.version(name) is None
    ]
    facts = {
        "cpu": f"{cpu_model()}, {environment.describe()['cores']} cores",
        "memory": f"{environment.memory_bytes() / 2**30:.1f} GiB",
        "disk": _disk(lacks),
        "jetpack": _jetpack(),
        "torch": _torch(),
    }
    for name in NEEDED[1:]:
        facts[name] = environment.version(name) or "missing"
    from yolo_compress.runtime.engine import BACKENDS

    for name, backend in BACKENDS.items():
        hint = backend.probe()
        facts[name] = (
            environment.version(environment.ENGINE_PACKAGES[name]) or "installed"
            if hint is None
            else f"missing: {hint}"
        )
    return facts, lacks


def _disk(lacks: list[str]) -> str:
    free = free_mib(home.weights())
    if free < FREE_MIB:
        lacks.append(f"{free:.0f} MiB free at {home.weights()}/, a stage needs {FREE_MIB}")
    return f"{free / 2**10:.1f} GiB free"


def _jetpack() -> str:
    release = Path("/etc/nv_tegra_release")
    return release.read_text(errors="replace").split("\n")[0] if release.is_file() else "not a Jetson"


def _torch() -> str:
    version = environment.version("torch")
    if version is None:
        return "missing"
    import torch

    if not torch.cuda.is_available():
        return f"{version}, no CUDA device"
    return f"{version}, CUDA {torch.version.cuda}: " + ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
