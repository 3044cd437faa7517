"""One engine per runtime and precision; what cannot be built here is listed with the reason, never replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.evaluate.rows import ENGINES, EngineRow, Model, Precision
from yolo_compress.files.atomic import atomic_write
from yolo_compress.quant.ranges import WEIGHT_BITS
from yolo_compress.quant.saturation import saturates
from yolo_compress.recipe.recipe import EngineConfig, Recipe
from yolo_compress.runtime.engine import BACKENDS, onnx_form
from yolo_compress.runtime.registry import RUNTIMES, names
from yolo_compress.stages import Job
from yolo_compress.stages.metrics import EngineMetrics

MODELS: tuple[Model, ...] = ("original", "compressed")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def run(job: Job) -> EngineMetrics:
    """Folders `<model>/<runtime>-<precision>` and `engines.json`, the rows that `bench` measures."""
    config: EngineConfig = job.config
    export = job.inputs["export"]
    missing = _missing(config)
    saturated = _saturated(job.recipe, missing)
    rows: list[EngineRow] = []
    for runtime in missing:
        for model in MODELS:
            for precision in PRECISIONS:
                source = _source(list(export.manifest.files), model, runtime, precision)
                if source is None:
                    continue
                reason = missing[runtime] or (saturated.get(runtime) if precision == "int8" else None)
                row: EngineRow = {
                    "model": model,
                    "runtime": runtime,
                    "precision": precision,
                    "source": source,
                    "reason": reason,
                }
                if not reason:
                    folder = f"{model}/{runtime}-{precision}"
                    progress.say(f"engine: {folder}")
                    row |= {
                        "folder": folder,
                        "size_mib": _build(job, export.file(source), runtime, precision, job.out / folder),
                    }
                rows.append(row)
    for hint in filter(None, [*missing.values(), *saturated.values()]):
        progress.say(f"engine: left out: {hint}")
    atomic_write(job.out / ENGINES, json.dumps(rows, indent=1) + "\n")
    return {"engines": sum("folder" in row for row in rows), "missing": sum("folder" not in row for row in rows)}


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse, before any stage runs, a runtime that is asked for by name and cannot be used here.

    Raises:
        EnvironmentLacks: It is not installed.
        RecipeError: Its INT8 saturates on this processor.
    """
    assert recipe.engine is not None
    _saturated(recipe, _missing(recipe.engine))


def _missing(config: EngineConfig) -> dict[str, str | None]:
    """The runtimes that are wanted, and what to install where one is missing.

    Raises:
        EnvironmentLacks: It was asked for by name.
    """
    wanted = list(BACKENDS) if config.runtimes == "auto" else list(config.runtimes)
    missing = {runtime: BACKENDS[runtime].probe() for runtime in wanted}
    if config.runtimes != "auto" and any(missing.values()):
        raise EnvironmentLacks("; ".join(f"engine.runtimes: {hint}" for hint in missing.values() if hint))
    return missing


def _saturated(recipe: Recipe, missing: Mapping[str, str | None]) -> dict[str, str]:
    """The installed runtimes that cannot run the INT8 files on this processor, and why.

    Raises:
        RecipeError: It was asked for by name.
    """
    if not (recipe.export and recipe.engine and recipe.qat) or "int8" not in recipe.export.precisions:
        return {}
    if recipe.qat.weight_bits <= WEIGHT_BITS:
        return {}
    found: dict[str, str] = {
        runtime: f"INT8 on {runtime}: 8-bit weights saturate on this processor, which has no VNNI; set qat.weight_bits=7"
        for runtime in names(gpu=False)
        if runtime in missing and not missing[runtime] and saturates(runtime)
    }
    if found and recipe.engine.runtimes != "auto":
        raise RecipeError("; ".join(f"engine.runtimes: {why}" for why in found.values()))
    return found


def _source(files: list[str], model: str, runtime: str, precision: str) -> str | None:
    """The export that suits this runtime: its own form where there is one."""
    stems = {Path(name).stem for name in files if name.startswith(f"{model}/") and name.endswith(".onnx")}
    stem = onnx_form(stems, runtime, precision)
    return None if stem is None else f"{model}/{stem}.onnx"


def _build(job: Job, onnx: Path, runtime: str, precision: str, out: Path) -> float:
    """Build one engine and return the MiB of what has to be on the robot."""
    config: EngineConfig = job.config
    options = {"workspace_mib": config.workspace_mib} if "workspace_mib" in RUNTIMES[runtime].build_options else {}
    files = BACKENDS[runtime].build(onnx, out, precision, **options)
    return sum(path.stat().st_size for path in files.values()) / 2**20
