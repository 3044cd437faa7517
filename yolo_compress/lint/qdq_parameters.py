"""Rules on the parameters of single Q and DQ nodes: integer types, zero points, scales, axes.

NVIDIA, "Working with Quantized Types" (8.5 to 11.x): INT8 is symmetric. Activations have one scale per tensor. Weights have one
scale per output channel. Biases are not INT32. The rules quote the errors of TensorRT-RTX 1.7.1 for other files.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from yolo_compress.lint.graph import WEIGHTED, Graph
from yolo_compress.lint.node import DQ, Q, QuantParams, attribute, name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import SYMMETRIC, TENSORRT, UNSIGNED, Target

QMAX = 127
CPU_WEIGHT_CODES = 63  # largest INT8 weight: 255 * 63 * 2 fits in 16 bits, 255 * 127 * 2 does not


def _all_params(graph: Graph) -> list[QuantParams]:
    return [graph.params(node) for node in graph.nodes if node.op_type in (Q, DQ)]


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind))


def nonzero_zero_points(graph: Graph, target: Target) -> Hits:
    for params in _all_params(graph):
        if params.zero is None:
            yield name_of(params.node), "the zero point is computed, not stored"
        elif params.zero.any():
            values = np.unique(params.zero.astype(np.int64))
            yield (
                name_of(params.node),
                f"zero point {', '.join(map(str, values[:3]))}{' ...' if len(values) > 3 else ''}",
            )


def unsupported_integer_types(graph: Graph, target: Target) -> Hits:
    """Find UINT8 and 16-bit types. FP8, INT4 and FP4 are separate schemes; `bias-int32` covers INT32."""
    odd = (TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16)
    for params in _all_params(graph):
        if params.type in odd:
            no_zero_point = len(params.node.input) < 3 or not params.node.input[2]
            yield (
                name_of(params.node),
                _type_name(params.type) + (", the default without a zero point" if no_zero_point else ""),
            )


def int32_biases(graph: Graph, target: Target) -> Hits:
    for params in _all_params(graph):
        if params.type == TensorProto.INT32:
            yield name_of(params.node), f"dequantises {params.node.input[0]} from INT32"


def bad_scales(graph: Graph, target: Target) -> Hits:
    for params in _all_params(graph):
        if params.scale is None:
            continue
        bad = params.scale[~(np.isfinite(params.scale) & (params.scale > 0))]
        if bad.size:
            yield name_of(params.node), f"{bad.size} of {params.scale.size} scales are {float(bad.ravel()[0]):g}"


def computed_scales(graph: Graph, target: Target) -> Hits:
    for params in _all_params(graph):
        if params.scale is None:
            yield name_of(params.node), f"scale {params.node.input[1]} is computed"


def unequal_pairs(graph: Graph, target: Target) -> Hits:
    for params in _all_params(graph):
        producer = graph.producer.get(graph.source_of(params.node.input[0]))
        if params.node.op_type == DQ and producer is not None and producer.op_type == Q:
            before = graph.params(producer)
            if before.key != params.key:
                yield name_of(params.node), f"quantised with {before.text}, dequantised with {params.text}"


def _weight_params(graph: Graph) -> list[tuple[QuantParams, str, int]]:
    """Return (parameters of its DQ node, name of its layer, axis of the output channels) for each quantised weight."""
    found = []
    for node in graph.nodes:
        params = graph.params_of(node.input[1]) if node.op_type in WEIGHTED else None
        if params is not None and graph.is_constant(node.input[1]):
            across = node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
            found.append((params, name_of(node), int(across)))
    return found


def _channels(graph: Graph, params: QuantParams, axis: int) -> int:
    shape = graph.shapes.get(graph.before_qdq(params.node.output[0]), ())
    return (shape[axis] or 0) if len(shape) > axis else 0


def weights_per_tensor(graph: Graph, target: Target) -> Hits:
    for params, owner, axis in _weight_params(graph):
        channels = _channels(graph, params, axis)
        if params.scale is not None and params.scale.size == 1 and channels > 1:
            yield owner, f"one scale for {channels} output channels"


def wrong_axes(graph: Graph, target: Target) -> Hits:
    for params, owner, axis in _weight_params(graph):
        if params.scale is not None and params.scale.size > 1 and params.axis != axis:
            yield owner, f"{params.scale.size} scales along axis {params.axis}, the output channels are axis {axis}"


def features_per_channel(graph: Graph, target: Target) -> Hits:
    for params in (*graph.quantizers(Q), *graph.quantizers(DQ)):
        if params.scale is not None and params.scale.size > 1:
            yield name_of(params.node), f"{params.scale.size} scales for one activation tensor"


def float_weights(graph: Graph, target: Target) -> Hits:
    for params, owner, _ in _weight_params(graph):
        producer = graph.producer.get(graph.source_of(params.node.input[0]))
        if producer is not None and producer.op_type == Q:
            yield owner, "the weight is stored as float and quantised in the graph"


def signed_features(graph: Graph, target: Target) -> Hits:
    for params in graph.quantizers():
        if params.type == TensorProto.INT8:
            yield name_of(params.node), f"activation {params.node.input[0]} as INT8"


def saturating_weights(graph: Graph, target: Target) -> Hits:
    for params, owner, _ in _weight_params(graph):
        stored = graph.value(graph.before_qdq(params.node.output[0]))
        if stored is None or params.scale is None or params.type not in (TensorProto.INT8, TensorProto.UINT8):
            continue
        if stored.dtype.kind == "f":
            shape = [-1 if index == params.axis else 1 for index in range(stored.ndim)]
            scale = params.scale.reshape(shape) if params.scale.size > 1 else params.scale
            stored = np.rint(stored / np.where(scale > 0, scale, 1))
        zero = 0 if params.zero is None or params.zero.size != 1 else int(params.zero.ravel()[0])
        largest = int(np.abs(np.nan_to_num(stored.astype(np.float64)) - zero).clip(max=QMAX).max(initial=0))
        if largest > CPU_WEIGHT_CODES:
            yield owner, f"INT8 values up to {largest}, safe up to {CPU_WEIGHT_CODES}"


CODES = (
    Rule(
        "zero-point",
        "error",
        'TensorRT refuses the file: "Non-zero zero point is not supported"; only the DLA has a flag to allow it. NCNN is not built '
        "from it.",
        "Quantise symmetrically (ONNX Runtime: ActivationSymmetric and WeightSymmetric); here: export, int8.onnx.",
        nonzero_zero_points,
        SYMMETRIC,
    ),
    Rule(
        "code-type",
        "error",
        'TensorRT refuses the file: "UINT8 zero_point only on DLA"; its activations are INT8.',
        "Store activations and weights as INT8 with an explicit zero point of 0; here: export, int8.onnx.",
        unsupported_integer_types,
        TENSORRT,
    ),
    Rule(
        "bias-int32",
        "error",
        'TensorRT refuses the file: "input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8".',
        "Leave biases in float (ONNX Runtime: extra option QuantizeBias=False).",
        int32_biases,
        TENSORRT,
    ),
    Rule(
        "scale-value",
        "error",
        "All values computed from this tensor are 0, infinity or NaN.",
        "Calibrate again on images that activate this layer; a scale of 0 comes from a dead channel or a black image.",
        bad_scales,
    ),
    Rule(
        "scale-computed",
        "error",
        "TensorRT accepts only scales that are stored in the file.",
        "Fold constants (onnxsim), or use static quantisation instead of dynamic.",
        computed_scales,
        TENSORRT,
    ),
    Rule(
        "pair-unequal",
        "warning",
        "The pair multiplies its tensor by the ratio of the scales, which changes the results of the model.",
        "Use the same scale, zero point and type for both nodes of a Q/DQ pair.",
        unequal_pairs,
    ),
    Rule(
        "weight-per-tensor",
        "warning",
        "The output channel with the largest weights sets the scale of all channels. This costs accuracy, most of it in "
        "small and depthwise layers.",
        "Use one scale per output channel (ONNX Runtime: per_channel=True).",
        weights_per_tensor,
    ),
    Rule(
        "weight-axis",
        "error",
        "TensorRT refuses the file. Other runtimes apply the scales to the wrong channels and compute wrong results.",
        "Set axis of the DequantizeLinear (its default is 1): 0 for Conv, 1 for ConvTranspose.",
        wrong_axes,
    ),
    Rule(
        "feature-per-channel",
        "error",
        "TensorRT supports only one scale per activation tensor.",
        "Use one scale for the tensor.",
        features_per_channel,
        TENSORRT,
    ),
    Rule(
        "weight-float",
        "info",
        "The file is up to four times as large as necessary. A runtime that does not fold the Q runs the layer in float.",
        "Store INT8 weights and a DequantizeLinear instead of float weights with Q and DQ.",
        float_weights,
    ),
    Rule(
        "feature-signed",
        "warning",
        "On x86 ONNX Runtime runs signed activations slower than FP32, and OpenVINO on AVX2 loses most of the mAP.",
        "Use UINT8 activations with zero point 128 and the same scales; here: int8-onnxruntime.onnx, int8-openvino.onnx.",
        signed_features,
        UNSIGNED,
    ),
    Rule(
        "weight-saturates",
        "warning",
        "x86 without VNNI adds two products in 16 bits, which overflow silently: mAP50-95 of YOLOv8n on BCCD fell from 0.613 "
        "to 0.049.",
        "Use 7-bit weights (ONNX Runtime: reduce_range=True). Here export writes them for CPUs; qat.weight_bits=7 trains them.",
        saturating_weights,
        UNSIGNED,
    ),
)
