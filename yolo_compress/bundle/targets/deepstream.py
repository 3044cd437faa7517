"""DeepStream: ONNX files with the output layout of DeepStream-Yolo's parser, and the configuration of nvinfer.

`NvDsInferParseYolo` (github.com/marcoslucianops/DeepStream-Yolo, nvdsparsebbox_Yolo.cpp at commit b451b036) reads one output [A, 6]
for each image: x1, y1, x2, y2 in px of the model's input, score, class. Older commits (64fa573f, 07feae95) read centres and sizes,
or three outputs. They would draw wrong boxes. Models of this package output [4 + nc, A] for nc classes and A anchors. So a few
nodes are added at the end of the FP32 and INT8 files.
"""

from __future__ import annotations

import configparser
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.bundle.network_io import Network, read, require
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.exported_files import literal
from yolo_compress.runtime.max_detections import MAX_DET
from yolo_compress.runtime.secure.signed_manifest import Versioned

FOLDER = "deepstream"
CONFIG, LABELS, MODEL, INT8 = "config_infer_primary.txt", "labels.txt", "model.onnx", "model-int8.onnx"
PARSER, COLUMNS = "NvDsInferParseYolo", 6
MOST_APART = 1e-3  # px; rounding of one float32 subtraction at 4,096 px
_COLOURS = {3: "0", 1: "2"}  # model-color-format by number of channels: RGB, grey
_FIXED = {
    "network-mode": "2",  # FP16; 1 is INT8 with nvinfer's own calibrator
    "process-mode": "1",  # whole frames
    "network-type": "0",  # detector
    "cluster-mode": "2",  # NMS for each class
    "maintain-aspect-ratio": "1",  # letterbox in the middle, as in training
    "symmetric-padding": "1",
    "parse-bbox-func-name": PARSER,
    "custom-lib-path": "nvdsinfer_custom_impl_Yolo/libnvdsinfer_custom_impl_Yolo.so",
}
_HEAD = """# nvinfer for {name}, version {version}. Follows the documents; never run on a DeepStream machine.
# Copy this folder out of the bundle: nvinfer writes its engine next to the ONNX file, and a bundle with a file that its
# manifest does not list is refused. Put DeepStream-Yolo's library into the copy: commit b451b036 or later, for boxes as
# x1, y1, x2, y2.
"""
_INT8 = """# INT8: nvinfer's own INT8 mode needs a calibrator, but this model has its scales in the graph. So build the plan with
#   trtexec --onnx={int8} --int8 --fp16 --saveEngine=model-int8.plan      (TensorRT 8.5 to 10)
# and add model-engine-file=model-int8.plan to [property]: nvinfer loads it instead of building one.
"""


def write(directory: Path, network: Network, about: Versioned, precision: str) -> list[str]:
    """Write the files for DeepStream: ONNX files in the parser's layout, the configuration of nvinfer, and the class names.

    The FP32 file is written, and the INT8 file if there is one.

    Returns:
        The written files, relative to `directory`.

    Raises:
        RecipeError: A class name cannot be in labels.txt.
    """
    for name in about["names"]:
        if ";" in name or len(name.splitlines()) != 1:
            raise RecipeError(
                f"target deepstream: class name {name!r}: labels.txt allows no line break and no semicolon; rename the class"
            )
    folder = directory / FOLDER
    folder.mkdir()
    rows(network, folder / MODEL)
    files = [MODEL, CONFIG, LABELS]
    if "int8" in about["onnx"]:
        rows(read(directory / about["onnx"]["int8"]), folder / INT8)
        files.append(INT8)
    settings = {
        "gpu-id": "0",
        "net-scale-factor": f"{1 / 255:.16f}",
        "infer-dims": ";".join(str(side) for side in network.input.shape[1:]),
        "onnx-file": MODEL,
        "labelfile-path": LABELS,
        "batch-size": str(max(network.batch, 1)),
        "num-detected-classes": str(len(about["names"])),
        "interval": "0",
        "gie-unique-id": "1",
        "model-color-format": _COLOURS[network.input.shape[1]],
        **_FIXED,
    }
    head = _HEAD.format(name=" ".join(str(about["name"]).split()), version=about["version"])
    text = head + (_INT8.format(int8=INT8) if INT8 in files else "") + "\n[property]\n"
    text += "".join(f"{key}={value}\n" for key, value in settings.items())
    text += f"\n[class-attrs-all]\nnms-iou-threshold={network.iou}\npre-cluster-threshold=0.25\ntopk={about.get('max_det', MAX_DET)}\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / LABELS).write_text("".join(f"{name}\n" for name in about["names"]), encoding="utf-8")
    return [f"{FOLDER}/{name}" for name in files]


def rows(network: Network, out: Path) -> None:
    """Write a copy of an ONNX file to `out`, with the output `output` [B, A, 6] in place of `output0` [B, 4 + nc, A].

    A row of `output` is x1, y1, x2, y2, score, class. A column of `output0` is centre x, centre y, width, height, then nc scores.
    """
    model = onnx.load(str(network.path))
    graph = model.graph
    integers = {"rows_0": 0, "rows_2": 2, "rows_4": 4, "rows_end": network.output.shape[1], "rows_axis": 2}
    for name, value in integers.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "rows_half"))
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if opset >= 18:  # since opset 18, axes is an input
        best = helper.make_node("ReduceMax", ["rows_scores", "rows_axis"], ["rows_score"], keepdims=1)
    else:
        best = helper.make_node("ReduceMax", ["rows_scores"], ["rows_score"], axes=[2], keepdims=1)
    graph.node.extend(
        [
            helper.make_node("Transpose", [network.output.name], ["rows_all"], perm=[0, 2, 1]),
            helper.make_node("Slice", ["rows_all", "rows_0", "rows_2", "rows_axis"], ["rows_centre"]),
            helper.make_node("Slice", ["rows_all", "rows_2", "rows_4", "rows_axis"], ["rows_size"]),
            helper.make_node("Slice", ["rows_all", "rows_4", "rows_end", "rows_axis"], ["rows_scores"]),
            helper.make_node("Mul", ["rows_size", "rows_half"], ["rows_reach"]),
            helper.make_node("Sub", ["rows_centre", "rows_reach"], ["rows_low"]),
            helper.make_node("Add", ["rows_centre", "rows_reach"], ["rows_high"]),
            best,
            helper.make_node("ArgMax", ["rows_scores"], ["rows_index"], axis=2, keepdims=1),
            helper.make_node("Cast", ["rows_index"], ["rows_class"], to=TensorProto.FLOAT),
            helper.make_node("Concat", ["rows_low", "rows_high", "rows_score", "rows_class"], ["output"], axis=2),
        ]
    )
    batch, _, anchors = network.output.shape
    del graph.output[:]
    shape = ["batch" if batch < 0 else batch, anchors, COLUMNS]
    graph.output.append(helper.make_tensor_value_info("output", TensorProto.FLOAT, shape))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))


def _same_boxes(path: Path, rows_graph: Network, source: Network) -> None:
    """Run the rewritten ONNX file and its source on noise, and check that both return the same boxes.

    Raises:
        RecipeError: The boxes differ by more than `MOST_APART`.
    """
    batch, *sides = source.input.shape
    noise_BCHW = np.random.default_rng(0).random((max(batch, 1), *sides), dtype=np.float32)
    output_BCA, rows_BA6 = literal(source.path)(noise_BCHW), literal(rows_graph.path)(noise_BCHW)
    centre, half = output_BCA[:, :2], output_BCA[:, 2:4] / np.float32(2)
    best, label = output_BCA[:, 4:].max(1, keepdims=True), output_BCA[:, 4:].argmax(1)[:, None]
    expected_BA6 = np.concatenate([centre - half, centre + half, best, label], 1).transpose(0, 2, 1)
    apart = float(np.abs(rows_BA6 - expected_BA6).max())
    if not apart <= MOST_APART:
        raise RecipeError(
            f"{path}: {rows_graph.path.name} differs from {source.path.name} by {apart:.3g}; make the bundle again"
        )


def check(directory: Path, network: Network, about: Versioned) -> None:
    """Read configuration, labels and ONNX files back, and compare them with the model. The files are also run on noise.

    Raises:
        RecipeError: A value or an output differs.
    """
    folder = directory / FOLDER
    parsed = configparser.ConfigParser(interpolation=None, strict=True)
    parsed.read_string((folder / CONFIG).read_text(encoding="utf-8"))
    said, path = parsed["property"], folder / CONFIG
    for name in (said["onnx-file"], *([INT8] if "int8" in about["onnx"] else [])):
        graph = read(folder / name)
        require(path, (graph.input.kind, graph.output.kind), ("FLOAT", "FLOAT"), f"{name}: types")
        require(path, graph.input.shape, network.input.shape, f"{name}: input")
        wanted = (network.output.shape[0], network.output.shape[2], COLUMNS)
        require(path, graph.output.shape, wanted, f"{name}: output")
        _same_boxes(path, graph, read(directory / about["onnx"]["int8" if name == INT8 else "fp32"]))
    require(path, said["infer-dims"], ";".join(str(side) for side in network.input.shape[1:]), "infer-dims")
    require(path, said["model-color-format"], _COLOURS[network.input.shape[1]], "model-color-format")
    require(path, int(said["num-detected-classes"]), network.output.shape[1] - 4, "num-detected-classes")
    require(path, int(said["batch-size"]), max(network.batch, 1), "batch-size")
    require(path, float(parsed["class-attrs-all"]["nms-iou-threshold"]), network.iou, "nms-iou-threshold")
    require(path, round(float(said["net-scale-factor"]) * 255, 6), 1.0, "255 times net-scale-factor")
    labels = (folder / said["labelfile-path"]).read_text(encoding="utf-8").splitlines()
    require(path, labels, list(about["names"]), "labelfile-path")
    for key, value in _FIXED.items():
        require(path, said[key], value, key)
