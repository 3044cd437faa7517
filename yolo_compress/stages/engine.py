"""Stage `engine`: build one engine per runtime and precision. For each engine that cannot be built here, record the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.evaluate.int8_check import int8_check
from yolo_compress.evaluate.rows import ENGINES, EngineRow, Model, Precision
from yolo_compress.evaluate.wrong_layer import first_wrong_layer
from yolo_compress.export.activations import check_converted
from yolo_compress.files.atomic import atomic_write
from yolo_compress.quant.ranges import WEIGHT_BITS
from yolo_compress.quant.saturation import saturates
from yolo_compress.recipe.recipe import EngineConfig, ExportConfig, Recipe
from yolo_compress.runtime.backends.base import SIDECAR, load_info
from yolo_compress.runtime.detect.pre import letterbox, read_image
from yolo_compress.runtime.engine import BACKENDS, onnx_forms
from yolo_compress.runtime.errors import EngineError, NotConverted
from yolo_compress.runtime.measure.int8_file import WrongBoxes, build_suited, choice
from yolo_compress.runtime.registry import INT8_IMAGES, RUNTIMES, names, with_option
from yolo_compress.stages import Job, _load_or_train
from yolo_compress.stages.metrics import EngineMetrics

MODELS: tuple[Model, ...] = ("original", "compressed")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
FLOAT = "fp32"  # stem of the file that INT8 engines are compared with
CHECKED_IMAGES = 16


class _Built(TypedDict):
    """The keys of `EngineRow` that a build decides."""

    source: str
    size_mib: float
    choice: NotRequired[str]


def run(job: Job) -> EngineMetrics:
    """Build the engines into `<model>/<runtime>-<precision>`. Write `engines.json` with an entry for each, for the stage `bench`.

    Raises:
        WrongBoxes, NotConverted: The recipe names a runtime whose INT8 engines give wrong boxes on this processor, or whose
            converter cannot write this model.
    """
    config: EngineConfig = job.config
    export = job.inputs["export"]
    missing = _missing(config, job.recipe.export)
    saturated = _saturated(job.recipe, missing)
    rows: list[EngineRow] = []
    for runtime in missing:
        for model in MODELS:
            for precision in PRECISIONS:
                sources = _sources(list(export.manifest.files), model, runtime, precision)
                if not sources:
                    continue
                reason = missing[runtime] or (saturated.get(runtime) if precision == "int8" else None)
                row: EngineRow = {
                    "model": model,
                    "runtime": runtime,
                    "precision": precision,
                    "source": sources[0],
                    "reason": reason,
                }
                if not reason:
                    folder = f"{model}/{runtime}-{precision}"
                    progress.say(f"engine: {folder}")
                    try:
                        row |= {"folder": folder, **_build(job, sources, runtime, precision, job.out / folder)}
                    except (WrongBoxes, NotConverted) as error:
                        if config.runtimes != "auto":
                            raise
                        shutil.rmtree(job.out / folder, ignore_errors=True)
                        row["reason"] = str(error)
                        progress.say(f"engine: left out: {error}")
                rows.append(row)
    for hint in filter(None, [*missing.values(), *saturated.values()]):
        progress.say(f"engine: left out: {hint}")
    atomic_write(job.out / ENGINES, json.dumps(rows, indent=1) + "\n")
    return {"engines": sum("folder" in row for row in rows), "missing": sum("folder" not in row for row in rows)}


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, that the runtimes named in the recipe can be used on this machine.

    Raises:
        EnvironmentLacks: A runtime is not installed.
        RecipeError: INT8 sums of a named runtime overflow (saturate) on this processor, which would make its mAP wrong. Or its
            converter does not write an activation of the model.
    """
    assert recipe.engine is not None and recipe.export is not None
    _saturated(recipe, _missing(recipe.engine, recipe.export))
    named = (
        () if recipe.engine.runtimes == "auto" else recipe.engine.runtimes
    )  # auto leaves an engine out, with the reason
    converted = [runtime for runtime in named if RUNTIMES[runtime].converter]
    if converted:
        model = _load_or_train.start(recipe.baseline, dataset, recipe.run.seed, "baseline")
        for runtime in converted:
            check_converted(model, recipe.export.opset, runtime, f"leave {runtime} out of engine.runtimes")


def _missing(config: EngineConfig, export: ExportConfig | None) -> dict[str, str | None]:
    """Return the requested runtimes: name -> why no engine can be built, such as what to install. None: it can be built.

    Raises:
        EnvironmentLacks: A runtime that the recipe names is missing. Or `engine.int8_images` is set, and no runtime that takes it
            can be used.
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
    unable = [missing[runtime] for runtime in with_option(INT8_IMAGES) if runtime in missing]
    if config.int8_images and all(unable):
        raise EnvironmentLacks("; ".join(f"engine.int8_images: {hint}" for hint in unable))
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


def _sources(files: list[str], model: str, runtime: str, precision: str) -> list[str]:
    """Return the exported ONNX files to build from, as `onnx_forms`. Without a float file, INT8 is built from the first one alone."""
    stems = {Path(name).stem for name in files if name.startswith(f"{model}/") and name.endswith(".onnx")}
    forms = onnx_forms(stems, runtime, precision)
    return [f"{model}/{stem}.onnx" for stem in (forms if FLOAT in stems else forms[:1])]


def _wrong_layer(file: Path, runtime: str, image_3HW: np.ndarray) -> str:
    """Return which layer of an INT8 file the library computes wrongly, as text for an error message."""
    try:
        return f"in {file.name}, {first_wrong_layer(file, runtime, image_3HW)}"
    except EngineError as error:
        return f"its layers cannot be compared ({error})"


def _build(job: Job, sources: list[str], runtime: str, precision: str, out: Path) -> _Built:
    """Build one engine from one of these exported files."""
    config: EngineConfig = job.config
    export = job.inputs["export"]
    files = {export.file(source): source for source in sources}
    chosen, *others = files
    if others:
        float_file = chosen.with_name(f"{FLOAT}.onnx")
        images = [read_image(sample.image) for sample in job.dataset.val[:CHECKED_IMAGES]]
        threads = job.recipe.bench.threads if job.recipe.bench else None
        try:
            chosen = build_suited(runtime, list(files), out, int8_check(files, float_file, images), threads=threads)
        except WrongBoxes as error:
            progress.say(f"engine: {out.parent.name}/{out.name}: wrong boxes; looking for the layer")
            image_3HW, _ = letterbox(images[0], job.imgsz_hw)
            raise WrongBoxes(f"{error}; {_wrong_layer(chosen, runtime, image_3HW)}") from error
    else:
        given = {"workspace_mib": config.workspace_mib, INT8_IMAGES: config.int8_images and precision == "int8"}
        options = {name: value for name, value in given.items() if runtime in with_option(name)}
        BACKENDS[runtime].build(chosen, out, precision, **options)
    info = load_info(out)
    built: _Built = {
        "source": files[chosen],
        "size_mib": sum((out / name).stat().st_size for name in (*info.files, SIDECAR)) / 2**20,
    }
    if info.tried:
        built["choice"] = choice(chosen.name, info.tried)
        progress.say(f"engine: {out.parent.name}/{out.name}: built from {built['choice']}")
    return built
