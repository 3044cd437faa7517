"""Stage `engine`: build one engine per runtime and precision. For each engine that cannot be built here, record the reason."""

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
from yolo_compress.recipe.recipe import EngineConfig, ExportConfig, Recipe
from yolo_compress.runtime.engine import BACKENDS, onnx_form
from yolo_compress.runtime.registry import RUNTIMES, names
from yolo_compress.stages import Job
from yolo_compress.stages.metrics import EngineMetrics

MODELS: tuple[Model, ...] = ("original", "compressed")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def run(job: Job) -> EngineMetrics:
    """Build the engines into `<model>/<runtime>-<precision>`. Write `engines.json` with an entry for each, for the stage `bench`."""
    config: EngineConfig = job.config
    export = job.inputs["export"]
    missing = _missing(config, job.recipe.export)
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
    """Check, before any stage runs, that the runtimes named in the recipe can be used on this machine.

    Raises:
        EnvironmentLacks: A runtime is not installed.
        RecipeError: INT8 sums of a named runtime overflow (saturate) on this processor, which would make its mAP wrong.
    """
    assert recipe.engine is not None
    _saturated(recipe, _missing(recipe.engine, recipe.export))


def _missing(config: EngineConfig, export: ExportConfig | None) -> dict[str, str | None]:
    """Return the requested runtimes: name -> why no engine can be built, such as what to install. None: it can be built.

    Raises:
        EnvironmentLacks: A runtime that the recipe names is missing.
        RecipeError: A runtime that the recipe names cannot take the images of `export.batch`.
    """
    wanted = list(BACKENDS) if config.runtimes == "auto" else list(config.runtimes)
    images = export.batch if export else 1
    missing: dict[str, str | None] = {}
    for runtime in wanted:
        most = RUNTIMES[runtime].most_images
        if most is not None and images > most:
            missing[runtime] = f"{runtime} takes {most} image in an inference, export.batch is {images}"
            if config.runtimes != "auto":
                raise RecipeError(f"engine.runtimes: {missing[runtime]}; leave one of the two out")
        else:
            missing[runtime] = BACKENDS[runtime].probe()
    if config.runtimes != "auto" and any(missing.values()):
        raise EnvironmentLacks("; ".join(f"engine.runtimes: {hint}" for hint in missing.values() if hint))
    return missing


def _saturated(recipe: Recipe, missing: Mapping[str, str | None]) -> dict[str, str]:
    """Return installed runtime -> reason, for the runtimes whose INT8 sums overflow (saturate) on this processor.

    Raises:
        RecipeError: The recipe names such a runtime.
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
    """Return the exported ONNX file to build from: a file made for this runtime, else the general file.

    Return None if there is no file.
    """
    stems = {Path(name).stem for name in files if name.startswith(f"{model}/") and name.endswith(".onnx")}
    stem = onnx_form(stems, runtime, precision)
    return None if stem is None else f"{model}/{stem}.onnx"


def _build(job: Job, onnx: Path, runtime: str, precision: str, out: Path) -> float:
    """Build one engine, and return the size in MiB of the files that the robot needs."""
    config: EngineConfig = job.config
    options = {"workspace_mib": config.workspace_mib} if "workspace_mib" in RUNTIMES[runtime].build_options else {}
    files = BACKENDS[runtime].build(onnx, out, precision, **options)
    return sum(path.stat().st_size for path in files.values()) / 2**20
