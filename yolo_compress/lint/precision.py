"""Rules on FP16 and BF16. Up to TensorRT 10, builder flags set the precision. From 11 on, the types in the graph set it."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from yolo_compress.lint.graph import WEIGHTED, Graph
from yolo_compress.lint.node import DQ, Q, name_of
from yolo_compress.lint.placement import joined_outputs
from yolo_compress.lint.rule import WHOLE, Hits, Rule
from yolo_compress.lint.targets import TENSORRT, Target

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
FP16_MAX = 65504.0
HALF_QDQ_OPSET = 19  # the first opset whose Q and DQ accept float16 and bfloat16
BF16_TENSORRT = (10, 0)
STRONGLY_TYPED = (11, 0)  # first TensorRT without precision flags


def half_typed_pairs(graph: Graph, target: Target) -> Hits:
    if graph.opset < HALF_QDQ_OPSET:
        for node in graph.nodes:
            if node.op_type in (Q, DQ) and graph.params(node).scale_type in (FLOAT16, BFLOAT16):
                yield name_of(node), f"half precision at opset {graph.opset}"


def bfloat16(graph: Graph, target: Target) -> Hits:
    """Find bfloat16 layers. On CPUs, OpenVINO has a bfloat16 convolution. ONNX Runtime 1.32 has none (NOT_IMPLEMENTED)."""
    if target.runtime == "openvino" or (target.runtime == "tensorrt" and target.lowest >= BF16_TENSORRT):
        return
    for node in graph.nodes:
        if node.op_type in WEIGHTED and graph.types.get(node.output[0]) == BFLOAT16:
            yield name_of(node), "computes in bfloat16"


def infinite_weights(graph: Graph, target: Target) -> Hits:
    for name, kind in graph.constants():
        if kind in (FLOAT16, BFLOAT16):
            stored = graph.value(name)
            bad = 0 if stored is None else int((~np.isfinite(stored.astype(np.float32))).sum())
            if bad:
                yield name, f"{bad} values are infinite or NaN"


def weights_beyond_half(graph: Graph, target: Target) -> Hits:
    """Find float32 weights beyond the FP16 range. Up to TensorRT 10 the FP16 flag converts them during the build."""
    if target.lowest >= STRONGLY_TYPED:
        return
    for node in graph.nodes:
        if node.op_type in WEIGHTED:
            for name in node.input[1:]:
                stored = graph.value(name) if graph.types.get(name) == FLOAT else None
                largest = 0.0 if stored is None else float(np.abs(stored).max(initial=0.0))
                if largest > FP16_MAX:
                    yield name_of(node), f"{name} reaches {largest:g}"


def half_boxes(graph: Graph, target: Target) -> Hits:
    for output, _, joint in joined_outputs(graph):
        if graph.types.get(joint.output[0]) in (FLOAT16, BFLOAT16):
            yield name_of(joint), f"output {output} is joined in half precision"


def float_between(graph: Graph, target: Target) -> Hits:
    """Find INT8 layers with float32 outputs: the layers between them then run in float32."""
    if target.highest < STRONGLY_TYPED:
        return
    convs = [node for node in graph.nodes if node.op_type in WEIGHTED and graph.is_int8(node)]
    floats = [node for node in convs if graph.types.get(node.output[0]) == FLOAT]
    if floats:
        yield WHOLE, f"{len(floats)} of {len(convs)} INT8 layers have float32 outputs"


PRECISION = (
    Rule(
        "half-qdq",
        "error",
        "Parsers refuse the file: Q and DQ in half precision require opset 19.",
        "Export with opset 19 or later (TensorRT 10 and later), or use float32 for Q and DQ.",
        half_typed_pairs,
    ),
    Rule(
        "bf16",
        "error",
        "The target has no bfloat16 convolution: TensorRT before 10 and ONNX Runtime on a CPU refuse the file.",
        "Export float16 or float32.",
        bfloat16,
    ),
    Rule(
        "half-infinite",
        "error",
        "A weight overflowed in half precision; the outputs are infinity or NaN.",
        "Leave that layer in float32, or rescale it; here: export refuses to write such a file.",
        infinite_weights,
    ),
    Rule(
        "half-range",
        "warning",
        "With the FP16 flag (alone or together with INT8) TensorRT up to 10 turns the weight into infinity.",
        "Leave that layer in float32 (layer precision), or rescale it.",
        weights_beyond_half,
        TENSORRT,
    ),
    Rule(
        "half-boxes",
        "warning",
        "float16 has steps of 0.5 above 512, so boxes move by up to a quarter of a pixel.",
        "Cast to float32 before the decode; here: fp16.onnx does.",
        half_boxes,
    ),
    Rule(
        "float-between",
        "warning",
        "TensorRT 11 has no precision flags, so the layers between INT8 layers run in FP32.",
        "For TensorRT 11 export the float layers as float16, at opset 19 or later. Up to 10 set the flags INT8 and FP16.",
        float_between,
        TENSORRT,
    ),
)
