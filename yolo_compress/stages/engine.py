"""One engine per runtime and precision; what cannot be built here is listed with the reason, never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from yolo_compress import progress
from yolo_compress.artifact import atomic_write
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.recipe import EngineConfig
from yolo_compress.runtime.engine import BACKENDS, onnx_form
from yolo_compress.stages import Job

MODELS = ("original", "compressed")


def run(job: Job) -> dict[str, Any]:
    """Folders `<model>/<runtime>-<precision>` and `engines.json`, the rows that `bench` measures."""
    config: EngineConfig = job.config
    export = job.inputs["export"]
    wanted = list(BACKENDS) if config.runtimes == "auto" else list(config.runtimes)
    missing = {runtime: BACKENDS[runtime].probe() for runtime in wanted}
    if config.runtimes != "auto" and any(missing.values()):
        raise EnvironmentLacks("; ".join(f"engine.runtimes: {hint}" for hint in missing.values() if hint))
    rows = []
    for runtime in wanted:
        for model in MODELS:
            for precision in ("fp32", "fp16", "int8"):
                source = _source(list(export.manifest.files), model, runtime, precision)
                if source is None:
                    continue
                row = {"model": model, "runtime": runtime, "precision": precision, "reason": missing[runtime]}
                if not missing[runtime]:
                    folder = f"{model}/{runtime}-{precision}"
                    progress.say(f"engine: {folder}")
                    row |= {
                        "folder": folder,
                        "size_mib": _build(job, export.file(source), runtime, precision, job.out / folder),
                    }
                rows.append(row)
    for hint in filter(None, missing.values()):
        progress.say(f"engine: left out: {hint}")
    atomic_write(job.out / "engines.json", json.dumps(rows, indent=1) + "\n")
    return {"engines": sum("folder" in row for row in rows), "missing": sum("folder" not in row for row in rows)}


def _source(files: list[str], model: str, runtime: str, precision: str) -> str | None:
    """The export that suits this runtime: its own form where there is one."""
    stems = {Path(name).stem for name in files if name.startswith(f"{model}/") and name.endswith(".onnx")}
    stem = onnx_form(stems, runtime, precision)
    return None if stem is None else f"{model}/{stem}.onnx"


def _build(job: Job, onnx: Path, runtime: str, precision: str, out: Path) -> float:
    """Build one engine and return the MiB of what has to be on the robot."""
    config: EngineConfig = job.config
    options = {"workspace_mib": config.workspace_mib} if runtime == "tensorrt" else {}
    files = BACKENDS[runtime].build(onnx, out, precision, **options)
    return sum(path.stat().st_size for path in files.values()) / 2**20
