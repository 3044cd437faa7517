"""Write CoreML packages (`.mlpackage`) for phones and Macs from ONNX files. They are converted on any system, and never run here.

A package has the input and output of its ONNX file. One with NMS has those of Apple's Vision framework: an image of pixels, and the
boxes of all objects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yolo_compress.errors import RecipeError
from yolo_compress.export.nms import NMS_CONF, NMS_IOU, NO_NMS
from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime.backends.coreml import CONFIDENCE, COORDINATES, THRESHOLDS
from yolo_compress.runtime.backends.coreml_convert import content, convert, library, package
from yolo_compress.runtime.backends.coreml_program import RAW
from yolo_compress.runtime.backends.onnx_metadata import names_and_imgsz, needs_nms

VERSION = 8  # of CoreML's format: iOS 17, macOS 14


def write_package(source: Path, out: Path, precision: str, nms: bool = False) -> None:
    """Write a CoreML package with the layers, number types and INT8 scales of an ONNX file.

    Args:
        source: Exported file without NMS. For int8, `int8-tensorrt11.onnx`. It is only read.
        out: Folder to write, `NAME.mlpackage`. It must not exist.
        precision: fp32, fp16 or int8.
        nms: Append CoreML's own NMS: score at least 0.25, IoU 0.7, each class by itself. The input is then an image of 8-bit RGB or
            grey pixels. The outputs are `confidence` [boxes, classes] and `coordinates` [boxes, 4]: x and y of the centre, width,
            height, as fractions of the image.

    Raises:
        RecipeError: The boxes of the model need no NMS.
        RuntimeUnavailable: coremltools is missing.
        EngineError: The file cannot be converted, for a reason that `coreml_convert.convert` lists.
        StorageError: The package cannot be written.
    """
    names, imgsz = names_and_imgsz(source)
    if nms and not needs_nms(source):
        raise RecipeError(f"{source}: {NO_NMS}")
    about = {"names": "\n".join(names), "precision": precision, "licence": "AGPL-3.0"}
    spec, weights = content(convert(source, imgsz, precision, vision=nms), about)
    if nms:
        spec = _with_nms(spec, names, imgsz)
    with storage_errors(out):
        package(spec.SerializeToString(deterministic=True), weights, out)


def _with_nms(program: Any, names: tuple[str, ...], imgsz: tuple[int, int]) -> Any:
    """Return the specification of a pipeline: a program that gives `RAW`, then CoreML's NMS."""
    proto = library().proto
    pixels = program.description.input[0]
    channels = pixels.type.multiArrayType.shape[1]
    image = proto.FeatureTypes_pb2.ImageFeatureType
    pixels.type.Clear()
    pixels.type.imageType.height, pixels.type.imageType.width = imgsz
    pixels.type.imageType.colorSpace = image.RGB if channels == 3 else image.GRAYSCALE
    nms = proto.Model_pb2.Model(specificationVersion=VERSION)
    suppression = nms.nonMaximumSuppression
    suppression.pickTop.perClass = True
    suppression.stringClassLabels.vector.extend(names)
    suppression.iouThreshold, suppression.confidenceThreshold = NMS_IOU, NMS_CONF
    suppression.iouThresholdInputFeatureName, suppression.confidenceThresholdInputFeatureName = THRESHOLDS
    suppression.confidenceInputFeatureName, suppression.coordinatesInputFeatureName = RAW
    suppression.confidenceOutputFeatureName, suppression.coordinatesOutputFeatureName = CONFIDENCE, COORDINATES
    columns = {CONFIDENCE: len(names), COORDINATES: 4}
    double = proto.FeatureTypes_pb2.ArrayFeatureType.DOUBLE
    for raw, (name, count) in zip(program.description.output, columns.items(), strict=True):
        nms.description.input.add().CopyFrom(raw)
        made = nms.description.output.add(name=name)
        made.type.multiArrayType.dataType = double
        for least, most in ((0, -1), (count, count)):  # any number of boxes
            made.type.multiArrayType.shapeRange.sizeRanges.add(lowerBound=least, upperBound=most)
    for name, default in zip(THRESHOLDS, (NMS_IOU, NMS_CONF), strict=True):
        threshold = nms.description.input.add(name=name, shortDescription=f"default {default}")
        threshold.type.doubleType.SetInParent()
        threshold.type.isOptional = True
    whole = proto.Model_pb2.Model(specificationVersion=VERSION)
    whole.pipeline.models.add().CopyFrom(program)
    whole.pipeline.models.add().CopyFrom(nms)
    whole.pipeline.names.extend(["detector", "nms"])
    whole.description.input.add().CopyFrom(pixels)
    whole.description.input.extend(nms.description.input[len(RAW) :])
    whole.description.output.extend(nms.description.output)
    whole.description.metadata.CopyFrom(program.description.metadata)
    return whole
