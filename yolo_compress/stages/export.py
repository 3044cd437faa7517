"""ONNX in every precision and TorchScript, for the original and for the compressed net, compared with torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from torch import nn

from yolo_compress import progress, ultra
from yolo_compress.artifact import Artifact
from yolo_compress.errors import CompressError
from yolo_compress.evaluate.compare import max_abs_difference
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export_nms import with_nms
from yolo_compress.export_onnx import export_onnx, export_torchscript
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.calibration_cache import write_cache
from yolo_compress.quant.half import to_fp16
from yolo_compress.quant.lint.check import check
from yolo_compress.quant.lint.halves import HALF_QDQ_OPSET
from yolo_compress.quant.placement import plan
from yolo_compress.quant.qdq import insert_qdq
from yolo_compress.quant.state import QuantState, fold
from yolo_compress.quant.torchscript import export_int8_torchscript
from yolo_compress.recipe import ExportConfig
from yolo_compress.runtime.ort import OrtBackend
from yolo_compress.runtime.pre import letterbox, read_image
from yolo_compress.stages import Job
from yolo_compress.stages.batches import chosen, letterboxed, write_list

CPU_RUNTIMES: tuple[Literal["onnxruntime", "openvino"], ...] = ("onnxruntime", "openvino")
COMPARED_IMAGES = 16
LINT_VERSION = "10.3"  # weakly typed, so floats between INT8 layers are no fault: FP16 is a flag there
MAX_SCORE_DIFFERENCE = 1e-4
MAX_BOX_DIFFERENCE_PX = (
    0.1  # float32 rounding in a net that detects well is below 0.01; a wrong graph is off by whole pixels
)


def run(job: Job) -> dict[str, Any]:
    """Folders `original` and `compressed` with `fp32.onnx`, `fp16.onnx`, `int8.onnx` its per-runtime forms, and TorchScript.

    The original's INT8 is PTQ; the compressed net's has the ranges of `qat`, or PTQ where the recipe leaves qat out.
    """
    config: ExportConfig = job.config
    metrics: dict[str, Any] = {}
    for name, source, ranges in (
        ("original", job.inputs["baseline"], None),
        ("compressed", job.inputs["distill"], job.inputs["qat"]),
    ):
        folder = job.out / name
        folder.mkdir()
        model = ultra.load_model(source.file("model.pt"))
        metrics[name] = _float_files(job, model, folder)
        if "int8" in config.precisions:
            metrics[name] |= _int8_files(job, model, ranges, folder)
        if "fp32" not in config.precisions:
            (folder / "fp32.onnx").unlink()
        if config.nms:
            for file in sorted(folder.glob("*.onnx")):
                with_nms(file, file.with_name(f"{file.stem}-nms.onnx"))
        progress.say(f"export: {name} -> {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return metrics


def _float_files(job: Job, model: nn.Module, folder: Path) -> dict[str, Any]:
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


def _compare(job: Job, model: nn.Module, file: Path) -> dict[str, float]:
    """FP32 ONNX against torch on real images; the graph that is shipped is the one that is compared."""
    samples = job.dataset.val[:COMPARED_IMAGES]
    images = [letterbox(read_image(sample.image), job.imgsz_hw)[0] for sample in samples]
    with TorchBackend(model, job.dataset.names, job.imgsz_hw) as torch_side, OrtBackend(file) as onnx_side:
        difference = max_abs_difference(torch_side, onnx_side, images)
    if difference["scores"] > MAX_SCORE_DIFFERENCE or difference["boxes_px"] > MAX_BOX_DIFFERENCE_PX:
        raise CompressError(
            f"{file.name} differs from torch on {len(images)} images: scores by {difference['scores']:.2g} (allowed "
            f"{MAX_SCORE_DIFFERENCE}), boxes by {difference['boxes_px']:.2g} px (allowed {MAX_BOX_DIFFERENCE_PX}); "
            "try export.simplify=false or another export.opset"
        )
    return difference


def _int8_files(job: Job, model: nn.Module, ranges: Artifact | None, folder: Path) -> dict[str, Any]:
    """Q/DQ files and INT8 TorchScript: QAT weights and ranges where there are some, PTQ of `model` otherwise."""
    config: ExportConfig = job.config
    source = folder / "fp32.onnx"
    trained = ranges is not None and "quant.json" in ranges.manifest.files
    if trained:
        assert ranges is not None
        state = QuantState.load(ranges.file("quant.json"))
        model = ultra.load_model(ranges.file("model.pt"))
        source = job.work / "qat.onnx"
        _onnx(job, model, source)
    else:
        images = chosen(job, config.calib_images)
        write_list(job, images)
        batches = lambda: letterboxed(images, job.imgsz_hw)  # noqa: E731
        state = ptq(model, batches, config.calibrator, config.percentile)
    folded = state if state.folded else fold(state, model)
    counts = insert_qdq(source, folder / "int8.onnx", folded, "tensorrt")
    whole = len(folded.activations) == len(plan(model).tensors)
    _lint(folder / "int8.onnx", f"tensorrt-{LINT_VERSION}", whole)
    newer, codes = job.work / "opset19.onnx", job.work / "codes.onnx"
    _onnx(job, model, newer, max(config.opset, HALF_QDQ_OPSET))
    insert_qdq(newer, codes, folded, "tensorrt11")
    to_fp16(codes, folder / "int8-tensorrt11.onnx", "int8")
    _lint(folder / "int8-tensorrt11.onnx", "tensorrt-11.4", whole)
    for runtime in CPU_RUNTIMES:
        insert_qdq(source, folder / f"int8-{runtime}.onnx", folded, runtime)
        _lint(folder / f"int8-{runtime}.onnx", runtime, whole)
    if config.torchscript:
        names, out = job.dataset.names, folder / "int8.torchscript"
        export_int8_torchscript(model, out, job.imgsz_hw, folded, names=names, batch=config.batch)
    if config.calibration_cache:
        shutil.copyfile(source, folder / "int8-implicit.onnx")
        write_cache(source, folder / "int8-implicit.cache", folded)
    return {"int8_convs": counts.convs, "int8_from": "qat" if trained else f"ptq ({state.method})"}


def _lint(file: Path, target: str, whole: bool) -> None:
    """Refuse to publish an INT8 file that its runtime would not take, or, of a whole plan, that has float among its INT8.

    Raises:
        CompressError: With the findings.
    """
    report = check(file, target)
    if report.count("error") or (whole and report.count("warning")):
        raise CompressError(f"export wrote a file with faults, which is a bug here:\n{report.text()}")
