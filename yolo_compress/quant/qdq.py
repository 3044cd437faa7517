"""INT8 as a float ONNX graph plus ranges: explicit QuantizeLinear and DequantizeLinear nodes, typed for the runtime.

Every target gets the same scales on the inputs of the planned convolutions and the same INT8 weights (an output channel each,
symmetric, axis 0), float bias, no change of opset:

* "tensorrt", "openvino": activations INT8, zero point 0. TensorRT takes no other zero point and no INT32 bias.
* "onnxruntime": activations UINT8, zero point 128 (the same codes moved by 128). It fuses a convolution only with a
  quantised output, so with `state.outputs` further tensors are quantised where no planned convolution reads them: outputs
  of convolutions, sigmoids, products and sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.export_onnx import MIN_OPSET, write_metadata
from yolo_compress.quant.state import QMAX, QuantState

Target = Literal["tensorrt", "onnxruntime", "openvino"]
TARGETS: dict[Target, tuple[int, int]] = {  # element type and zero point of activations
    "tensorrt": (TensorProto.INT8, 0),
    "onnxruntime": (TensorProto.UINT8, 128),
    "openvino": (TensorProto.UINT8, 128),  # signed activations lose most of the mAP on AVX2 (0.613 -> 0.454)
}
# x86 without VNNI adds two products of INT8 codes in 16 bits and saturates: 8-bit weights then give garbage, silently
# (YOLOv8n on BCCD: 0.613 -> 0.049). 255 * 63 * 2 fits, so the forms for CPUs hold 7-bit weights on every machine; NNCF's
# `overflow_fix` and ONNX Runtime's `reduce_range` are the same remedy.
WEIGHT_QMAX: dict[Target, int] = {"tensorrt": QMAX, "onnxruntime": 63, "openvino": 63}


@dataclass(frozen=True)
class Counts:
    """What was put in: convolutions in INT8, Q/DQ pairs that feed them, and pairs on other tensors."""

    convs: int
    activations: int
    outputs: int


@dataclass(frozen=True)
class Pair:
    """One Q/DQ pair to be put behind `tensor`; `readers` read it through the pair (empty: all do)."""

    tensor: str
    amax: float
    dtype: int
    zero_point: int

    @property
    def scale(self) -> float:
        """Of one code."""
        return self.amax / QMAX


def insert_qdq(float_onnx: Path, out: Path, state: QuantState, target: Target) -> Counts:
    """Write the INT8 form of a float graph.

    Convolutions that read one tensor with one range share one pair. The counts are checked against the graph that was made.

    Args:
        float_onnx: What `export_onnx` wrote, opset 13 or more. Read only.
        out: File to write.
        state: Ranges with BatchNorm folded (`state.fold`), of the network in `float_onnx`.
        target: Key of `TARGETS`.

    Raises:
        RecipeError: Unknown target.
        CorruptArtifact: Graph and state do not belong together (a convolution is missing, has other channels, ...).
        CompressError: The graph made is not as planned.
    """
    if target not in TARGETS:
        raise RecipeError(f"Q/DQ target {target!r} is unknown; there are {', '.join(TARGETS)}")
    if not state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is not folded into it; call fold() with the trained model")
    model = onnx.load(str(float_onnx))
    graph = model.graph
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if opset < MIN_OPSET:
        raise CorruptArtifact(f"{float_onnx}: opset {opset}, Q/DQ an output channel needs {MIN_OPSET}; export again")
    convs = find_convs(graph, state.convs)
    dtype, zero_point = TARGETS[target]
    wanted = {name: Pair(conv.input[0], state.activations[name], dtype, zero_point) for name, conv in convs.items()}
    elsewhere: dict[str, Pair] = {}
    if target == "onnxruntime" and state.outputs:
        elsewhere = _output_pairs(graph, convs, state)
    for name, conv in convs.items():
        _quantise_weight(graph, name, conv, np.asarray(state.weights[name], dtype=np.float32), WEIGHT_QMAX[target])
    _insert_pairs(graph, {conv.output[0]: wanted[name] for name, conv in convs.items()}, elsewhere)
    counts = Counts(len(convs), len(set(wanted.values())), len(set(elsewhere.values()) - set(wanted.values())))
    _check(graph, state.convs, counts, out)
    write_metadata(model, {"precision": "int8"})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))
    return counts


def find_convs(graph: onnx.GraphProto, names: Iterable[str]) -> dict[str, onnx.NodeProto]:
    """The node of each convolution, by the name of its weight (`<module>.weight`), which simplifiers leave alone.

    Raises:
        CorruptArtifact: A convolution is in the graph not once.
    """
    by_weight: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            by_weight.setdefault(node.input[1], []).append(node)
    found = {}
    for name in names:
        nodes = by_weight.get(f"{name}.weight", [])
        if len(nodes) != 1:
            raise CorruptArtifact(
                f"{name}: {len(nodes)} convolutions of the ONNX graph have the weight {name}.weight, expected 1 "
                f"(graph and quantiser state of different models, or two layers with equal weights)"
            )
        found[name] = nodes[0]
    return found


def _quantise_weight(graph: onnx.GraphProto, name: str, conv: onnx.NodeProto, amax_C: np.ndarray, qmax: int) -> None:
    """Replace a float weight by INT8 codes and a DequantizeLinear an output channel (put before all other nodes)."""
    stored = next((item for item in graph.initializer if item.name == conv.input[1]), None)
    if stored is None:
        raise CorruptArtifact(f"{name}: the weight of the ONNX convolution is computed, not stored; export again")
    weight = numpy_helper.to_array(stored)
    if len(weight) != len(amax_C):
        raise CorruptArtifact(f"{name}: {len(weight)} output channels in the ONNX graph, {len(amax_C)} in the state")
    scale_C = (amax_C / np.float32(qmax)).astype(np.float32)
    codes = np.rint(weight / scale_C.reshape(-1, 1, 1, 1)).clip(-qmax, qmax).astype(np.int8)
    parts: dict[str, np.ndarray] = {"quantized": codes, "scale": scale_C, "zero_point": np.zeros(len(scale_C), np.int8)}
    graph.initializer.remove(stored)
    graph.initializer.extend(numpy_helper.from_array(array, f"{name}.weight_{key}") for key, array in parts.items())
    inputs = [f"{name}.weight_{key}" for key in parts]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}.weight_dequantized"], f"{name}.weight_DQ", axis=0)
    graph.node.insert(0, node)
    conv.input[1] = node.output[0]


def _insert_pairs(graph: onnx.GraphProto, readers: dict[str, Pair], everywhere: dict[str, Pair]) -> None:
    """Put each pair behind the node that makes its tensor, and let its readers read it.

    Args:
        graph: Changed in place.
        readers: Output of a convolution -> the pair through which its first input reads.
        everywhere: Tensor -> the pair that all its other readers read through.
    """
    made: dict[Pair, str] = {}
    used: dict[str, int] = {}
    pairs = dict.fromkeys([*readers.values(), *everywhere.values()])
    behind: dict[str, list[Pair]] = {}
    for pair in pairs:
        count = used[pair.tensor] = used.get(pair.tensor, 0) + 1
        made[pair] = pair.tensor if count == 1 else f"{pair.tensor}_{count}"
        behind.setdefault(pair.tensor, []).append(pair)
    nodes: list[onnx.NodeProto] = []

    def put_behind(tensor: str) -> None:
        for pair in behind.get(tensor, ()):
            nodes.extend(_make_pair(graph, pair, made[pair]))

    for item in graph.input:
        put_behind(item.name)
    for node in list(graph.node):
        for index, tensor in enumerate(node.input):
            read = readers.get(node.output[0]) if index == 0 else None
            read = read or everywhere.get(tensor)
            if read is not None:
                node.input[index] = f"{made[read]}_DQ"
        nodes.append(node)
        for tensor in node.output:
            put_behind(tensor)
    del graph.node[:]
    graph.node.extend(nodes)


def _make_pair(graph: onnx.GraphProto, pair: Pair, base: str) -> list[onnx.NodeProto]:
    zero_type = np.int8 if pair.dtype == TensorProto.INT8 else np.uint8
    graph.initializer.append(numpy_helper.from_array(np.array(pair.scale, np.float32), f"{base}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(pair.zero_point, zero_type), f"{base}_zero_point"))
    scale = [f"{base}_scale", f"{base}_zero_point"]
    return [
        helper.make_node("QuantizeLinear", [pair.tensor, *scale], [f"{base}_Q"], f"{base}_Q"),
        helper.make_node("DequantizeLinear", [f"{base}_Q", *scale], [f"{base}_DQ"], f"{base}_DQ"),
    ]


def _output_pairs(graph: onnx.GraphProto, convs: dict[str, onnx.NodeProto], state: QuantState) -> dict[str, Pair]:
    """Pairs for the tensors that ONNX Runtime wants quantised to run convolution, SiLU and sum in INT8.

    A tensor that a planned convolution reads keeps that convolution's range, so it is quantised once.
    """
    dtype, zero_point = TARGETS["onnxruntime"]
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            consumers.setdefault(tensor, []).append(node)
    shared = {conv.input[0]: state.activations[name] for name, conv in convs.items()}
    planned = {conv.output[0] for conv in convs.values()}
    pairs: dict[str, Pair] = {}

    def quantise(tensor: str, amax: float) -> None:
        pairs[tensor] = Pair(tensor, shared.get(tensor, amax), dtype, zero_point)

    for name, conv in convs.items():
        made = conv.output[0]
        quantise(made, state.outputs[name])
        silu = {node.op_type: node for node in consumers.get(made, [])}
        if set(silu) != {"Sigmoid", "Mul"}:
            continue
        product = silu["Mul"].output[0]
        if all(node.op_type != "Conv" or node.output[0] in planned for node in consumers.get(product, [])):
            # A sigmoid fills 0 to 1 and nothing else: all 256 codes, from 0.
            pairs[silu["Sigmoid"].output[0]] = Pair(silu["Sigmoid"].output[0], QMAX / 255, dtype, 0)
            block = name.removesuffix(".conv")
            quantise(product, state.outputs[block])
            for node in consumers.get(product, []):
                parent = block.rpartition(".")[0]
                if node.op_type == "Add" and parent in state.outputs:
                    quantise(node.output[0], state.outputs[parent])
    return pairs


def _check(graph: onnx.GraphProto, names: Iterable[str], counts: Counts, out: Path) -> None:
    """The graph has the nodes that the plan says, no more and no less, and each convolution of it reads INT8 twice."""
    kinds = [node.op_type for node in graph.node]
    pairs = counts.activations + counts.outputs
    got = kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")
    if got != (pairs, pairs + counts.convs):
        raise CompressError(f"{out}: {got} Quantize/DequantizeLinear nodes, planned {(pairs, pairs + counts.convs)}")
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    int8 = {node.input[1] for node in graph.node if node.op_type == "Conv" and set(node.input[:2]) <= dequantised}
    if float_ones := [name for name in names if f"{name}.weight_dequantized" not in int8]:
        raise CompressError(f"{out}: planned convolutions that do not compute in INT8: {', '.join(float_ones)}")
