"""Add NMS to an ONNX graph, for programs without NMS. Decoders with NMS, such as Isaac ROS, read the raw output."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import write_metadata
from yolo_compress.files.atomic import storage_errors
from yolo_compress.runtime.backends.onnx_metadata import needs_nms
from yolo_compress.runtime.max_detections import MAX_DET

RAW, OUTPUT = "raw0", "output0"
PREFIX = "/nms"
NO_NMS = "the boxes of this model need no NMS (YOLO26); set export.nms=false"
NMS_SUFFIX = "-nms"  # appended to the name of the source file


NMS_CONF, NMS_IOU = 0.25, 0.7


def with_nms(source: Path, out: Path, conf: float = NMS_CONF, iou: float = NMS_IOU, max_det: int = MAX_DET) -> None:
    """Write a copy of an ONNX file whose output is the final boxes: NonMaxSuppression is added at the end of the graph.

    All runtimes support this ONNX operator (TensorRT as INMSLayer). `output0` becomes `[1, max_det, 6]` float32, as with
    Ultralytics' `nms=True`: x1, y1, x2, y2 in px of the input, score, class. Rows are sorted by score. Unused rows are zero. A box
    has only its best class, as in `runtime.detect.post.nms(multi_label=False)`.

    Args:
        source: Exported file of any precision. Its `output0` is `[1, 4 + nc, A]`, for nc classes and A anchors. It is only read.
        out: File to write.
        conf: Minimum score, exclusive.
        iou: A box is removed if its IoU with a better box of the same class exceeds this value.
        max_det: Number of rows of the output.

    Raises:
        RecipeError: The batch of the graph is not 1, or the boxes of the model need no NMS.
    """
    model = onnx.load(str(source))
    if not needs_nms(source):
        raise RecipeError(f"{source}: {NO_NMS}")
    graph, (batch, rows, anchors) = model.graph, _output_shape(model)
    if batch != 1:
        raise RecipeError(
            f"{source}: NMS in the graph requires a batch of 1, this graph has {batch or 'a dynamic one'}; set export.batch=1"
        )
    for node in graph.node:
        node.output[:] = [RAW if name == OUTPUT else name for name in node.output]
    classes = rows - 4
    constants: dict[str, np.ndarray] = {
        "sizes": np.array([4, classes], np.int64),
        "labels": np.arange(classes, dtype=np.int64).reshape(1, classes, 1),
        "none": np.zeros(1, np.float32),
        "most": np.array([max_det], np.int64),
        "iou": np.array([iou], np.float32),
        "conf": np.array([conf], np.float32),
        "one": np.array(1, np.int64),
        "two": np.array(2, np.int64),
        "anchors": np.array(anchors, np.int64),
        "half": np.array(0.5, np.float32),
        "pairs": np.array([2, 2], np.int64),
        "flat": np.array([-1], np.int64),
        "boxwise": np.array([anchors, 4], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([1], np.int64),
        "empty_rows": np.zeros((max_det, 6), np.float32),
        "empty_scores": np.zeros(max_det, np.float32),
    }
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> None:
        prefixed = [f"{PREFIX}/{name}" if name in constants else name for name in inputs]
        nodes.append(helper.make_node(kind, prefixed, list(outputs), f"{PREFIX}/{outputs[0]}", **attributes))

    add("Split", [RAW, "sizes"], "nms_boxes", "nms_scores", axis=1)
    add("Transpose", ["nms_boxes"], "nms_boxes_t", perm=[0, 2, 1])
    add("ArgMax", ["nms_scores"], "nms_best", axis=1, keepdims=1)
    add("Equal", ["nms_best", "labels"], "nms_is_best")
    add("Where", ["nms_is_best", "nms_scores", "none"], "nms_own")
    add("NonMaxSuppression", ["nms_boxes_t", "nms_own", "most", "iou", "conf"], "nms_kept", center_point_box=1)
    add("Gather", ["nms_kept", "one"], "nms_class", axis=1)
    add("Gather", ["nms_kept", "two"], "nms_anchor", axis=1)
    add("Mul", ["nms_class", "anchors"], "nms_row")
    add("Add", ["nms_row", "nms_anchor"], "nms_place")
    add("Reshape", ["nms_own", "flat"], "nms_flat")
    add("Gather", ["nms_flat", "nms_place"], "nms_score")
    add("Reshape", ["nms_boxes_t", "boxwise"], "nms_centres")
    add("Gather", ["nms_centres", "nms_anchor"], "nms_kept_boxes")
    add("Split", ["nms_kept_boxes", "pairs"], "nms_xy", "nms_wh", axis=1)
    add("Mul", ["nms_wh", "half"], "nms_half")
    add("Sub", ["nms_xy", "nms_half"], "nms_from")
    add("Add", ["nms_xy", "nms_half"], "nms_to")
    add("Cast", ["nms_class"], "nms_label", to=TensorProto.FLOAT)
    add("Unsqueeze", ["nms_score", "last"], "nms_score_column")
    add("Unsqueeze", ["nms_label", "last"], "nms_label_column")
    add("Concat", ["nms_from", "nms_to", "nms_score_column", "nms_label_column"], "nms_found", axis=1)
    add("Concat", ["nms_found", "empty_rows"], "nms_rows", axis=0)
    add("Concat", ["nms_score", "empty_scores"], "nms_ranked", axis=0)
    add("TopK", ["nms_ranked", "most"], "nms_values", "nms_order", axis=0)
    add("Gather", ["nms_rows", "nms_order"], "nms_best_rows", axis=0)
    add("Unsqueeze", ["nms_best_rows", "first"], OUTPUT)
    graph.initializer.extend(numpy_helper.from_array(value, f"{PREFIX}/{name}") for name, value in constants.items())
    graph.node.extend(nodes)
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, max_det, 6]))
    known = {item.key: item.value for item in model.metadata_props}
    args = {**ast.literal_eval(known.get("args", "{}")), "nms": True, "conf": conf, "iou": iou, "max_det": max_det}
    write_metadata(model, {"args": args})
    onnx.checker.check_model(model, full_check=True)
    with storage_errors(out):
        onnx.save(model, str(out))


def _output_shape(model: onnx.ModelProto) -> tuple[int, int, int]:
    """Return the shape of `output0` as (batch, rows, anchors). A dynamic size is returned as 0."""
    output = next(item for item in model.graph.output if item.name == OUTPUT)
    batch, rows, anchors = (size.dim_value for size in output.type.tensor_type.shape.dim)
    return batch, rows, anchors
