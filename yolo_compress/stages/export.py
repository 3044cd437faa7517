"""Stage `export`: write ONNX files in every precision and TorchScript for the baseline and the compressed model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from yolo_compress import progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CompressError, NumericsError
from yolo_compress.evaluate.backend_difference import max_abs_difference
from yolo_compress.evaluate.exported_files import check_nms
from yolo_compress.evaluate.layer_difference import MAX_ROUNDINGS, first_bad_layer
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.activations import check_int8
from yolo_compress.export.calibration_cache import IMPLICIT, write_implicit
from yolo_compress.export.float_onnx import export_onnx, export_torchscript
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.nms import NMS_SUFFIX, with_nms
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.export.torchscript import export_int8_torchscript, find_engine
from yolo_compress.lint import check as lint
from yolo_compress.lint.precision import HALF_QDQ_OPSET
from yolo_compress.lint.shapes import SHAPES
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import WEIGHT_BITS, QuantState, fold
from yolo_compress.recipe.recipe import ExportConfig, Recipe
from yolo_compress.report import numbers
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.detect.pre import letterbox, read_image
from yolo_compress.runtime.registry import qdq_forms
from yolo_compress.stages import Job, _coreml, _load_or_train
from yolo_compress.stages._calibration_images import calibration_samples, check_calibration, letterboxed, write_list
from yolo_compress.stages.metrics import ExportedModel, ExportMetrics, FloatFiles, Int8Files, NmsFiles
from yolo_compress.store.manifest import Artifact
from yolo_compress.train import checkpoint

COMPARED_IMAGES = 16
# Rules on widths, batch and weight bits. They are advice on the model and recipe, not faults of the export.
ADVICE = {*(rule.id for rule in SHAPES), "weight-saturates"}
# Largest difference from torch by float32 rounding. A well-trained model stays below a tenth of it; a wrong graph differs by px.
MAX_DIFFERENCE = {"scores": 1e-4, "boxes_px": 0.1}
# A model trained for a few steps amplifies rounding, so that torch in float32 differs as much from torch in float64. ONNX Runtime
# sums in another order, which gives about the same difference. Above this multiple of that difference the graph must be wrong.


def run(job: Job) -> ExportMetrics:
    """Write the folders `original` (baseline) and `compressed`: ONNX files of each precision and runtime, and TorchScript.

    INT8 files of the baseline are made by PTQ. INT8 files of the compressed model have the scales of `qat`. Without `qat` in the
    recipe, they are also made by PTQ.
    """
    return {
        "original": _export(job, "original", job.inputs["baseline"], None),
        "compressed": _export(job, "compressed", job.inputs["distill"], job.inputs["qat"]),
    }


def check(recipe: Recipe, dataset: Dataset) -> None:
    """Check, before any stage runs, that INT8 files and CoreML packages can be made: activations, calibration images and libraries.

    Raises:
        RecipeError: INT8 files or CoreML packages do not support an activation of the model.
        DataError: The calibration images cannot be used (see `check_calibration`).
        EnvironmentLacks: This torch has no quantised convolutions.
        RuntimeUnavailable: `export.coreml` is set, and coremltools is missing.
    """
    assert recipe.export is not None
    int8 = "int8" in recipe.export.precisions
    if int8:
        check_calibration(recipe, dataset, "export")
        if recipe.export.torchscript:
            find_engine()
    if int8 or recipe.export.coreml:
        model = _load_or_train.start(recipe.baseline, dataset, recipe.run.seed, "baseline")
        if recipe.export.coreml:
            _coreml.check(model, recipe.export.opset)
        if int8:
            check_int8(model, recipe.export.opset)


def _export(job: Job, name: str, origin: Artifact, ranges: Artifact | None) -> ExportedModel:
    """Write all exported files of one model into the folder `name`. `ranges` is the artefact of `qat`. None: use PTQ."""
    config: ExportConfig = job.config
    folder = job.out / name
    folder.mkdir()
    model = checkpoint.load_model(origin.file("model.pt"))
    made: ExportedModel = {**_float_files(job, model, folder)}
    if "int8" in config.precisions:
        made |= _int8_files(job, model, ranges, folder)
    if "fp32" not in config.precisions:
        (folder / "fp32.onnx").unlink()
    if config.nms:
        made |= _nms_files(job, folder)
    if config.coreml:
        _coreml.write(job, folder)
    progress.say(f"export: {numbers.model(name)}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return made


def _nms_files(job: Job, folder: Path) -> NmsFiles:
    """Write a copy of each ONNX file in `folder` with NMS in the graph. Check the copy's boxes against the file without NMS."""
    images, boxes = _compared_images(job), 0
    for file in sorted(folder.glob("*.onnx")):
        made = file.with_name(f"{file.stem}{NMS_SUFFIX}.onnx")
        with_nms(file, made, max_det=job.recipe.data.max_det)
        boxes += check_nms(made, file, images, job.recipe.data.max_det)
    return {"nms_images": len(images), "nms_boxes": boxes}


def _float_files(job: Job, model: nn.Module, folder: Path) -> FloatFiles:
    config: ExportConfig = job.config
    _onnx(job, model, folder / "fp32.onnx")
    difference = _compare(job, model, folder / "fp32.onnx")
    if "fp16" in config.precisions:
        to_fp16(folder / "fp32.onnx", folder / "fp16.onnx")
    if config.torchscript:
        export_torchscript(
            model, folder / "model.torchscript", job.imgsz_hw, names=job.dataset.names, batch=config.batch
        )
    return {"max_score_difference": difference["scores"], "max_box_difference_px": difference["boxes_px"]}


def _onnx(job: Job, model: nn.Module, out: Path, opset: int | None = None) -> None:
    config: ExportConfig = job.config
    export_onnx(
        model,
        out,
        job.imgsz_hw,
        names=job.dataset.names,
        opset=opset or config.opset,
        batch=config.batch,
        dynamic_batch=config.dynamic_batch,
        simplify=config.simplify,
    )


def _compared_images(job: Job) -> list[np.ndarray]:
    """Return letterboxed validation images, on which exported files are compared with torch."""
    samples, channels = job.dataset.val[:COMPARED_IMAGES], job.dataset.channels
    return [letterbox(read_image(sample.image), job.imgsz_hw, channels=channels)[0] for sample in samples]


def _compare(job: Job, model: nn.Module, file: Path) -> dict[str, float]:
    """Compare the exported FP32 ONNX file with torch on real images, and return the largest differences.

    Raises:
        NumericsError: The outputs differ by more than rounding. The message names the first layer that differs.
    """
    names, images = job.dataset.names, _compared_images(job)
    with TorchBackend(model, names, job.imgsz_hw) as torch_side, OrtBackend(file) as onnx_side:
        difference = max_abs_difference(torch_side, onnx_side, images)
        batch = np.repeat(images[0][None], onnx_side.batch or 1, axis=0)
        if all(difference[what] <= most for what, most in MAX_DIFFERENCE.items()):
            return difference
        with TorchBackend(model, names, job.imgsz_hw, precision="fp64") as exact:
            rounding = max_abs_difference(torch_side, exact, images)
    allowed = {what: max(most, MAX_ROUNDINGS * rounding[what]) for what, most in MAX_DIFFERENCE.items()}
    text = (
        f"{file.name} differs from torch on {len(images)} images: scores by {difference['scores']:.2g}, boxes by "
        f"{difference['boxes_px']:.2g} px; torch in float32 from float64: scores {rounding['scores']:.2g}, boxes "
        f"{rounding['boxes_px']:.2g} px"
    )
    if any(difference[what] > most for what, most in allowed.items()):
        raise NumericsError(
            f"{text}; allowed: scores {allowed['scores']:.2g}, boxes {allowed['boxes_px']:.2g} px. The first layer that "
            f"differs: {first_bad_layer(model, file, batch)}. Try export.simplify=false or another export.opset"
        )
    progress.say(f"export: {text}. The model amplifies rounding; train it for more epochs")
    return difference


def _int8_files(job: Job, model: nn.Module, ranges: Artifact | None, folder: Path) -> Int8Files:
    """Write Q/DQ files and INT8 TorchScript.

    Weights and scales come from `ranges` of `qat`. If `ranges` is None, PTQ of `model` makes them.
    """
    config: ExportConfig = job.config
    floats = folder / "fp32.onnx"
    trained = ranges is not None and "quant.json" in ranges.manifest.files
    if trained:
        assert ranges is not None
        state = QuantState.load(ranges.file("quant.json"))
        model = checkpoint.load_model(ranges.file("model.pt"))
        floats = job.work / "qat.onnx"
        _onnx(job, model, floats)
    else:
        images = calibration_samples(job, config.calib_images)
        write_list(job, images)
        batches = lambda: letterboxed(images, job.imgsz_hw, job.dataset.channels)  # noqa: E731
        bits = job.recipe.qat.weight_bits if job.recipe.qat else WEIGHT_BITS
        state = ptq(model, batches, config.calibrator, config.percentile, weight_bits=bits)
    folded = state if state.folded else fold(state, model)
    whole = len(folded.activations) == len(plan(model).tensors)
    for form, made in qdq_forms().items():
        file = folder / f"{made.stem}.onnx"
        if made.half:
            newer, codes = job.work / "opset19.onnx", job.work / "codes.onnx"
            _onnx(job, model, newer, max(config.opset, HALF_QDQ_OPSET))
            counts = insert_qdq(newer, codes, folded, form)
            to_fp16(codes, file, "int8")
        else:
            counts = insert_qdq(floats, file, folded, form)
        _advise(_lint(file, made.lint, whole), f"{folder.name} on {made.title}")
    if config.torchscript:
        names, out = job.dataset.names, folder / "int8.torchscript"
        export_int8_torchscript(model, out, job.imgsz_hw, folded, names=names, batch=config.batch)
    if config.calibration_cache:
        write_implicit(floats, folder / IMPLICIT, folded)
    return {"int8_convs": counts.convs, "int8_from": "qat" if trained else f"ptq ({state.method})"}


def _lint(file: Path, target: str, whole: bool) -> lint.Report:
    """Check an INT8 ONNX file against the rules of its target runtime, and return the findings.

    Args:
        file: ONNX file.
        target: Target of the lint.
        whole: All tensors should be INT8. A warning about float operations is then also a fault.

    Raises:
        CompressError: The lint found faults, which is a bug of the export.
    """
    report = lint.check(file, target)
    faults = whole and any(one.severity == "warning" and one.rule not in ADVICE for one in report.findings)
    if faults or report.count("error"):
        raise CompressError(f"export wrote a file with faults, which is a bug here:\n{report.text()}")
    return report


def _advise(report: lint.Report, model: str) -> None:
    """Print lint warnings that suggest a faster model. The file itself has no fault."""
    for name, count in report.rules.items():
        rule = lint.RULES[name]
        if rule.severity == "warning" and name in ADVICE:
            progress.say(f"export: {model}: lint {name} ({count}): {rule.consequence} {rule.fix}")
