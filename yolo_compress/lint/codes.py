"""Rules on the codes themselves: types, zero points, scales, axes.

NVIDIA, "Working with Quantized Types" (8.5 to 11.x): symmetric INT8 only, a scale a tensor for activations and an output
channel for weights, no INT32 bias. What TensorRT-RTX 1.7.1 says to graphs that break these is quoted in the rows.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from yolo_compress.lint.graph import WEIGHTED, Graph
from yolo_compress.lint.node import DQ, Codes, Q, attribute, name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import CPU, TENSORRT, Target

QMAX = 127
CPU_WEIGHT_CODES = 63  # 255 * 63 * 2 fits in 16 bits, 255 * 127 * 2 does not


def _all(graph: Graph) -> list[Codes]:
    return [graph.codes(node) for node in graph.nodes if node.op_type in (Q, DQ)]


def _type(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind))


def nonzero_zero_points(graph: Graph, target: Target) -> Hits:
    for codes in _all(graph):
        if codes.zero is None:
            yield name_of(codes.node), "the zero point is computed, not stored"
        elif codes.zero.any():
            values = np.unique(codes.zero.astype(np.int64))
            yield (
                name_of(codes.node),
                f"zero point {', '.join(map(str, values[:3]))}{' ...' if len(values) > 3 else ''}",
            )


def other_code_types(graph: Graph, target: Target) -> Hits:
    """UINT8 and 16 bits; FP8, INT4 and FP4 are other schemes, INT32 is `bias-int32`."""
    odd = (TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16)
    for codes in _all(graph):
        if codes.type in odd:
            left_out = len(codes.node.input) < 3 or not codes.node.input[2]
            yield (
                name_of(codes.node),
                _type(codes.type) + (", since it has no zero point to say INT8" if left_out else ""),
            )


def int32_biases(graph: Graph, target: Target) -> Hits:
    for codes in _all(graph):
        if codes.type == TensorProto.INT32:
            yield name_of(codes.node), f"dequantises {codes.node.input[0]} from INT32"


def bad_scales(graph: Graph, target: Target) -> Hits:
    for codes in _all(graph):
        if codes.scale is None:
            continue
        bad = codes.scale[~(np.isfinite(codes.scale) & (codes.scale > 0))]
        if bad.size:
            yield name_of(codes.node), f"{bad.size} of {codes.scale.size} scales are {float(bad.ravel()[0]):g}"


def computed_scales(graph: Graph, target: Target) -> Hits:
    for codes in _all(graph):
        if codes.scale is None:
            yield name_of(codes.node), f"scale {codes.node.input[1]} is computed"


def unequal_pairs(graph: Graph, target: Target) -> Hits:
    for codes in _all(graph):
        maker = graph.maker.get(graph.source_of(codes.node.input[0]))
        if codes.node.op_type == DQ and maker is not None and maker.op_type == Q:
            before = graph.codes(maker)
            if before.key != codes.key:
                yield name_of(codes.node), f"quantised with {before.text}, dequantised with {codes.text}"


def _weights(graph: Graph) -> list[tuple[Codes, str, int]]:
    """(DQ of a weight, name of the node it belongs to, axis of its output channels)."""
    found = []
    for node in graph.nodes:
        codes = graph.codes_of(node.input[1]) if node.op_type in WEIGHTED else None
        if codes is not None and graph.is_constant(node.input[1]):
            across = node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
            found.append((codes, name_of(node), int(across)))
    return found


def _channels(graph: Graph, codes: Codes, axis: int) -> int:
    shape = graph.shapes.get(graph.bare(codes.node.output[0]), ())
    return (shape[axis] or 0) if len(shape) > axis else 0


def weights_per_tensor(graph: Graph, target: Target) -> Hits:
    for codes, owner, axis in _weights(graph):
        channels = _channels(graph, codes, axis)
        if codes.scale is not None and codes.scale.size == 1 and channels > 1:
            yield owner, f"one scale for {channels} output channels"


def wrong_axes(graph: Graph, target: Target) -> Hits:
    for codes, owner, axis in _weights(graph):
        if codes.scale is not None and codes.scale.size > 1 and codes.axis != axis:
            yield owner, f"{codes.scale.size} scales along axis {codes.axis}, the output channels are axis {axis}"


def features_per_channel(graph: Graph, target: Target) -> Hits:
    for codes in (*graph.quantizers(Q), *graph.quantizers(DQ)):
        if codes.scale is not None and codes.scale.size > 1:
            yield name_of(codes.node), f"{codes.scale.size} scales for one activation tensor"


def float_weights(graph: Graph, target: Target) -> Hits:
    for codes, owner, _ in _weights(graph):
        maker = graph.maker.get(graph.source_of(codes.node.input[0]))
        if maker is not None and maker.op_type == Q:
            yield owner, "the weight is stored as float and quantised in the graph"


def signed_features(graph: Graph, target: Target) -> Hits:
    for codes in graph.quantizers():
        if codes.type == TensorProto.INT8:
            yield name_of(codes.node), f"activation {codes.node.input[0]} as INT8"


def saturating_weights(graph: Graph, target: Target) -> Hits:
    for codes, owner, _ in _weights(graph):
        stored = graph.value(graph.bare(codes.node.output[0]))
        if stored is None or codes.scale is None or codes.type not in (TensorProto.INT8, TensorProto.UINT8):
            continue
        if stored.dtype.kind == "f":
            shape = [-1 if index == codes.axis else 1 for index in range(stored.ndim)]
            scale = codes.scale.reshape(shape) if codes.scale.size > 1 else codes.scale
            stored = np.rint(stored / np.where(scale > 0, scale, 1))
        zero = 0 if codes.zero is None or codes.zero.size != 1 else int(codes.zero.ravel()[0])
        largest = int(np.abs(np.nan_to_num(stored.astype(np.float64)) - zero).clip(max=QMAX).max(initial=0))
        if largest > CPU_WEIGHT_CODES:
            yield owner, f"codes up to {largest}, {CPU_WEIGHT_CODES} is safe"


CODES = (
    Rule(
        "zero-point",
        "error",
        'TensorRT refuses the file: "Non-zero zero point is not supported"; only the DLA knows a flag for it.',
        "Quantise symmetrically (ONNX Runtime: ActivationSymmetric and WeightSymmetric); here: export, int8.onnx.",
        nonzero_zero_points,
        TENSORRT,
    ),
    Rule(
        "code-type",
        "error",
        'TensorRT refuses the file: "UINT8 zero_point only on DLA"; its activations are INT8.',
        "Type activations and weights INT8 with a stored zero point 0; here: export, int8.onnx.",
        other_code_types,
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
        "Everything behind it is 0, infinity or NaN.",
        "Calibrate again on images that reach this layer; a range of 0 comes from a dead channel or a black image.",
        bad_scales,
    ),
    Rule(
        "scale-computed",
        "error",
        "TensorRT takes scales that are stored in the file only.",
        "Fold constants (onnxsim), or quantise with static ranges instead of dynamic ones.",
        computed_scales,
        TENSORRT,
    ),
    Rule(
        "pair-unequal",
        "warning",
        "The pair multiplies its tensor by the ratio of the scales: the network is not the one that was trained.",
        "Give Q and DQ of a pair the same scale, zero point and type.",
        unequal_pairs,
    ),
    Rule(
        "weight-per-tensor",
        "warning",
        "The widest output channel sets the step of all of them: accuracy is lost, most in small and depthwise layers.",
        "One scale an output channel (ONNX Runtime: per_channel=True).",
        weights_per_tensor,
    ),
    Rule(
        "weight-axis",
        "error",
        "TensorRT refuses it. Elsewhere scales meant for output channels multiply input channels: another network.",
        "Set axis of the DequantizeLinear (its default is 1): 0 for Conv, 1 for ConvTranspose.",
        wrong_axes,
    ),
    Rule(
        "feature-per-channel",
        "error",
        "TensorRT quantises activations with one scale a tensor only.",
        "One scale for the tensor.",
        features_per_channel,
        TENSORRT,
    ),
    Rule(
        "weight-float",
        "info",
        "The file is four times as large as it has to be, and a runtime that does not fold the Q runs the layer in float.",
        "Store the codes (a DequantizeLinear of INT8) instead of float weights with Q and DQ.",
        float_weights,
    ),
    Rule(
        "feature-signed",
        "warning",
        "On x86 ONNX Runtime runs signed activations slower than FP32, and OpenVINO on AVX2 loses most of the mAP.",
        "Type activations UINT8 with zero point 128, the same scales; here: int8-onnxruntime.onnx, int8-openvino.onnx.",
        signed_features,
        CPU,
    ),
    Rule(
        "weight-saturates",
        "warning",
        "x86 without VNNI adds two products in 16 bits, which overflow in silence: YOLOv8n on BCCD fell from 0.613 to 0.049.",
        "7-bit weights (ONNX Runtime: reduce_range=True); here: the forms for CPUs hold them, qat.weight_bits=7 trains them.",
        saturating_weights,
        CPU,
    ),
)
