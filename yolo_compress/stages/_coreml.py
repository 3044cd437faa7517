"""CoreML packages of one model, with golden images and a program that checks them on a Mac. Nothing here runs CoreML."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from torch import nn

from yolo_compress import runtime
from yolo_compress.evaluate.exported_files import open_exported
from yolo_compress.evaluate.golden_images import sample, write_found
from yolo_compress.evaluate.tolerance import IOU, LEAST_SCORE, Detections
from yolo_compress.export.activations import check_converted
from yolo_compress.export.coreml import write_package
from yolo_compress.export.nms import NMS_SUFFIX
from yolo_compress.runtime.backends.coreml import RUNTIME
from yolo_compress.runtime.backends.coreml_convert import require
from yolo_compress.runtime.commands.coreml import ABOUT, SUFFIX, About
from yolo_compress.runtime.engine import onnx_forms
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.golden import FOLDER, EngineOf, detections
from yolo_compress.runtime.registry import PRECISIONS
from yolo_compress.stages import Job

GOLDEN_IMAGES = 4
CHECK = """#!/usr/bin/env python3
import sys

sys.dont_write_bytecode = True
from runtime.commands.coreml import main

sys.exit(main())
"""


def check(model: nn.Module, opset: int) -> None:
    """Check that packages of this model can be written here.

    Raises:
        RuntimeUnavailable: coremltools is missing.
        RecipeError: CoreML packages do not support an activation of the model.
    """
    require()
    check_converted(model, opset, RUNTIME, "set export.coreml=false")


def write(job: Job, folder: Path) -> None:
    """Write the folder `coreml` into the folder of a model's exported files.

    It has a package for each precision (and one with NMS for `export.nms`), golden images with the detections of the ONNX files,
    `check.py`, and `coreml.json` with the SHA-256 of every file.
    """
    assert job.recipe.export is not None
    out, stems = folder / RUNTIME, {file.stem for file in folder.glob("*.onnx")}
    out.mkdir()
    packages: dict[str, str] = {}
    found, about = dict[str, Detections](), dict[str, EngineOf]()
    samples, images = sample(job.dataset, GOLDEN_IMAGES)
    for precision in PRECISIONS:
        sources = onnx_forms(stems, RUNTIME, precision)
        if not sources or precision not in job.recipe.export.precisions:
            continue
        source = folder / f"{sources[0]}.onnx"
        for suffix in ("", NMS_SUFFIX) if job.recipe.export.nms else ("",):
            name = f"{precision}{suffix}{SUFFIX}"
            write_package(source, out / name, precision, nms=bool(suffix))
            packages[name] = precision
        with tempfile.TemporaryDirectory() as scratch, open_exported(source, precision, Path(scratch)) as simulated:
            found[f"{RUNTIME}-{precision}"] = detections(simulated, images, LEAST_SCORE, IOU)
            about[f"{RUNTIME}-{precision}"] = {
                "executed": simulated.executed,
                "library": "none",
                "onnx_sha256": sha256_file(source),
            }
            needs_nms = simulated.needs_nms
    names = [job.dataset.val[index].name for index in samples]
    write_found(out / FOLDER, names, images, found, about, GOLDEN_IMAGES)
    shutil.copytree(Path(str(runtime.__file__)).parent, out / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (out / "check.py").write_text(CHECK, encoding="utf-8")
    document: About = {
        "names": list(job.dataset.names),
        "imgsz": list(job.imgsz_hw),
        "channels": job.dataset.channels,
        "max_det": job.recipe.data.max_det,
        "needs_nms": needs_nms,
        "packages": packages,
        "files": {
            file.relative_to(out).as_posix(): sha256_file(file) for file in sorted(out.rglob("*")) if file.is_file()
        },
    }
    (out / ABOUT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
