"""Write INT8 ONNX graphs: insert QuantizeLinear and DequantizeLinear (Q/DQ) nodes into a float graph.

Each runtime needs its own form of the graph. All forms have the same scales on the same tensors, and the same INT8 weights. Weights
are symmetric, with one scale per output channel on axis 0, and 7 or 8 bits as trained. Biases stay float and the opset does not
change.

A tensor has one Q/DQ pair, after the node that computes it. All readers of the tensor use this pair.

The forms differ in these fields of `runtime.registry.Int8File`:

* `zero_point`: 0 with INT8 activations for TensorRT, which supports no other zero point and no INT32 bias. Otherwise 128 with UINT8
  activations, which are the same values plus 128.
* `half`: scales are exact in float16, and the graph needs opset 19. TensorRT 11 takes the precision from the types in the graph,
  and `fp16.to_fp16` converts all float tensors to float16.
* `forwarding_pairs`: pools, upsamplings, chunks and concatenations of INT8 tensors also have a pair at their output. This pair has the
  scale of the inputs, so it changes no value. It tells the runtime's ONNX importer that the layer is INT8. OpenVINO knows that without
  the pair, and runs the pair as a node of its own.
* `quantised_outputs`: the outputs of convolutions and sigmoids are quantised, too, with the ranges of `state.outputs`. Before
  SiLU the range is `quant.ranges.before_silu`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.export.float_onnx import MIN_OPSET, write_metadata
from yolo_compress.quant.plan import IMAGES
from yolo_compress.quant.ranges import QMAX, QuantState, before_silu
from yolo_compress.runtime.engine import onnx_forms
from yolo_compress.runtime.registry import Int8File, qdq_forms

FORMS = qdq_forms()
# Nodes of activations. An activation is one node (ReLU), or several that read only the convolution and constants (SiLU, GELU).
ELEMENTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish",
    "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sub", "Tanh", "ThresholdedRelu",
}  # fmt: skip
# Layers that only move values, so INT8 inputs give INT8 outputs of the same scale.
FORWARDING = {"MaxPool", "Resize", "Split", "Concat"}


@dataclass(frozen=True)
class Counts:
    """Numbers of convolutions and Q/DQ pairs in an INT8 graph.

    Attributes:
        convs: number of INT8 convolutions.
        activations: number of Q/DQ pairs on the INT8 tensors between layers.
        outputs: number of Q/DQ pairs inside blocks, see `_pairs_in_blocks`.
    """

    convs: int
    activations: int
    outputs: int


@dataclass(frozen=True)
class Pair:
    """Parameters of a Q/DQ pair of an activation.

    Attributes:
        scale: difference between two neighbouring values.
        dtype: element type of the INT8 tensor (`onnx.TensorProto`).
        zero_point: INT8 value that represents 0.
    """

    scale: float
    dtype: int
    zero_point: int

    @property
    def half(self) -> Pair:
        """The pair with its scale rounded up to float16."""
        return replace(self, scale=float(_round_up_to_half(np.array(self.scale, np.float32))))


def insert_qdq(float_onnx: Path, out: Path, state: QuantState, form: str) -> Counts:
    """Write an INT8 ONNX file: a float graph with Q/DQ nodes inserted, in the form that one runtime needs. Return node counts.

    Args:
        float_onnx: File written by `export_onnx`, opset 13 or later. It is only read.
        out: File to write.
        state: Ranges of the model in `float_onnx`, with BatchNorm folded (`quant.ranges.fold`).
        form: Key of `FORMS`, such as "tensorrt10" or "onnxruntime".

    Raises:
        RecipeError: `form` is unknown.
        CorruptArtifact: Graph and `state` do not belong together: a convolution is missing or has other channels.
        CompressError: The new graph does not have the expected Q/DQ nodes (see `_check`).
    """
    if form not in FORMS:
        raise RecipeError(f"Q/DQ form {form!r} is unknown, expected one of {', '.join(FORMS)}")
    file = FORMS[form]
    if not state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is not folded into it; call fold() with the trained model")
    model = onnx.load(str(float_onnx))
    graph = model.graph
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if opset < MIN_OPSET:
        raise CorruptArtifact(
            f"{float_onnx}: opset {opset}, but Q/DQ per output channel requires {MIN_OPSET}; export again"
        )
    convs = find_convs(graph, state.convs)
    amax = tensor_ranges(graph, state)
    if not file.forwarding_pairs:
        forwarded = {tensor for node in graph.node if node.op_type in FORWARDING for tensor in node.output}
        amax = {tensor: value for tensor, value in amax.items() if tensor not in forwarded}
    pairs = {tensor: Pair(value / QMAX, *_activation_type(file)) for tensor, value in amax.items()}
    if file.half:
        pairs = {tensor: pair.half for tensor, pair in pairs.items()}
    inner_pairs = (
        _pairs_in_blocks(graph, convs, state, pairs, _activation_type(file))
        if file.quantised_outputs and state.outputs
        else {}
    )
    for name, conv in convs.items():
        quantise_weight(graph, name, conv, state.weights[name], state.weight_qmax, half=file.half)
    insert_pairs(graph, pairs | inner_pairs)
    counts = Counts(len(convs), len(pairs), len(inner_pairs))
    _check(graph, state.convs, counts, out)
    write_metadata(model, {"precision": "int8"})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))
    return counts


def form_of(runtime: str) -> str:
    """Return the key of `FORMS` for the INT8 file that the installed version of a runtime is built from. NCNN takes TensorRT's."""
    stems = {file.stem: form for form, file in FORMS.items()}
    return stems[onnx_forms(stems, runtime, "int8")[0]]


def _activation_type(file: Int8File) -> tuple[int, int]:
    """Return (element type, zero point) of the activations of a form."""
    assert file.zero_point is not None
    return (TensorProto.UINT8 if file.zero_point else TensorProto.INT8), file.zero_point


def find_convs(graph: onnx.GraphProto, names: Iterable[str]) -> dict[str, onnx.NodeProto]:
    """Return a dict from convolution to ONNX node. The node is found by the name of its weight, `<convolution>.weight`.

    Simplifiers do not rename weights.

    Raises:
        CorruptArtifact: A convolution does not occur exactly once in the graph.
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
                f"{name}: {len(nodes)} convolutions of the ONNX graph have the weight {name}.weight, expected 1; "
                "graph and quantiser state belong to different models, or two layers have equal weights"
            )
        found[name] = nodes[0]
    return found


def _round_up_to_half(scale: np.ndarray) -> np.ndarray:
    """Round up to float16 and return float32. A scale must not become smaller, since more values would be clipped."""
    half = scale.astype(np.float16)
    half = np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)
    return half.astype(np.float32)


def quantise_weight(
    graph: onnx.GraphProto, name: str, conv: onnx.NodeProto, amax_C: Sequence[float], qmax: int, half: bool = False
) -> None:
    """Replace a float weight by INT8 values and a DequantizeLinear per output channel, in place.

    Args:
        name: Module name of the convolution.
        amax_C: Range of each output channel.
        qmax: Largest INT8 value, 63 or 127.
        half: Round the scale up to float16. The INT8 values do not change.

    Raises:
        CorruptArtifact: The weight is not stored in the graph, or has another number of output channels.
    """
    stored = next((item for item in graph.initializer if item.name == conv.input[1]), None)
    if stored is None:
        raise CorruptArtifact(f"{name}: the weight of the ONNX convolution is computed, not stored; export again")
    weight = numpy_helper.to_array(stored)
    if len(weight) != len(amax_C):
        raise CorruptArtifact(f"{name}: {len(weight)} output channels in the ONNX graph, {len(amax_C)} in the state")
    int8_values, scale_C = int8_weight(weight, amax_C, qmax)
    scale_C = _round_up_to_half(scale_C) if half else scale_C
    parts: dict[str, np.ndarray] = {
        "quantized": int8_values,
        "scale": scale_C,
        "zero_point": np.zeros(len(scale_C), np.int8),
    }
    graph.initializer.remove(stored)
    graph.initializer.extend(numpy_helper.from_array(array, f"{name}.weight_{key}") for key, array in parts.items())
    inputs = [f"{name}.weight_{key}" for key in parts]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}.weight_dequantized"], f"{name}.weight_DQ", axis=0)
    graph.node.insert(0, node)
    conv.input[1] = node.output[0]


def int8_weight(weight: np.ndarray, amax_C: Sequence[float], qmax: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the INT8 values of a weight, rounded as in training (`fakequant`), and the scale of each output channel."""
    amax = np.asarray(amax_C, np.float32)
    int8_values = np.rint(weight * (np.float32(qmax) / amax).reshape(-1, 1, 1, 1)).clip(-qmax, qmax).astype(np.int8)
    return int8_values, amax / np.float32(qmax)


def tensor_ranges(graph: onnx.GraphProto, state: QuantState) -> dict[str, float]:
    """Return ONNX tensor name -> range (amax) for every tensor of a float graph that becomes INT8.

    These are the tensors of `state`, the outputs of layers that only move the values of these tensors, and their sums.

    Raises:
        CorruptArtifact: A block or a sum is missing in the graph, or a concatenation has inputs with different scales or in
            different precisions.
    """
    return _extend_to_joins(graph, _planned_tensors(graph, state))


def _planned_tensors(graph: onnx.GraphProto, state: QuantState) -> dict[str, float]:
    """Return the range of each tensor of `state`, by ONNX name."""
    readers = readers_of(graph)
    sums = {name: last for name in state.activations if (last := _last_block_of_sum(graph, name, state))}
    blocks = [name for name in state.activations if name not in (IMAGES, *sums)]
    convs = find_convs(graph, [f"{name}.conv" for name in blocks])
    made = {name: activation_output(graph, convs[f"{name}.conv"])[0] for name in blocks} | {IMAGES: graph.input[0].name}
    for name, last in sums.items():
        adds = [node.output[0] for node in readers.get(made[last], ()) if node.op_type == "Add"]
        if len(adds) != 1:
            raise CorruptArtifact(f"{name}: {len(adds)} sums of the ONNX graph read {last}, expected 1")
        made[name] = adds[0]
    return {made[name]: amax for name, amax in state.activations.items()}


def _last_block_of_sum(graph: onnx.GraphProto, name: str, state: QuantState) -> str:
    """If the module `name` is a sum, return the last block of `state` inside it. If the module is a block, return ""."""
    blocks = [node.input[1].removesuffix(".conv.weight") for node in graph.node if node.op_type == "Conv"]
    inside = [block for block in blocks if block.startswith(f"{name}.") and block in state.activations]
    return inside[-1] if inside and name not in blocks else ""


def activation_output(graph: onnx.GraphProto, conv: onnx.NodeProto) -> tuple[str, set[str]]:
    """Return the output tensor of the activation after a convolution, and all tensors from the convolution up to it.

    Raises:
        CorruptArtifact: The activation has several outputs, or nodes that are not in `ELEMENTWISE`.
    """
    fixed = {item.name for item in graph.initializer} | {""}
    inside, ends = {conv.output[0]}, set[str]()
    for node in graph.node:
        if node.op_type == "Constant":
            fixed |= set(node.output)
        elif not inside.isdisjoint(node.input):
            if node.op_type in ELEMENTWISE and set(node.input) <= inside | fixed:
                inside |= set(node.output)
            else:
                ends |= inside & set(node.input)
    ends |= inside & {item.name for item in graph.output}
    if len(ends) != 1:
        raise CorruptArtifact(
            f"{conv.name}: the outputs of its activation are {', '.join(sorted(ends)) or 'none'}, expected one tensor"
        )
    return next(iter(ends)), inside


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that read each tensor, in the order of the graph."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            found.setdefault(tensor, []).append(node)
    return found


def _extend_to_joins(graph: onnx.GraphProto, amax: dict[str, float]) -> dict[str, float]:
    amax = dict(amax)
    for node in graph.node:
        if node.op_type not in FORWARDING and node.op_type != "Add":
            continue
        parts = node.input if node.op_type in ("Concat", "Add") else node.input[:1]
        ranges = {amax.get(tensor) for tensor in parts}
        if ranges == {None}:
            continue
        if len(ranges) > 1:
            raise CorruptArtifact(
                f"quantiser state: {node.name} joins tensors with ranges {sorted(map(str, ranges))}, expected equal ranges"
            )
        amax |= dict.fromkeys(node.output, ranges.pop() or 0.0)
    return amax


def insert_pairs(graph: onnx.GraphProto, pairs: dict[str, Pair]) -> None:
    """Insert each pair after the node that computes its tensor, and connect all readers to it, in place."""
    nodes: list[onnx.NodeProto] = []

    def append_pair(tensor: str) -> None:
        if tensor in pairs:
            nodes.extend(_make_pair(graph, pairs[tensor], tensor))

    for item in graph.input:
        append_pair(item.name)
    for node in list(graph.node):
        for index, tensor in enumerate(node.input):
            if tensor in pairs:
                node.input[index] = f"{tensor}_DQ"
        nodes.append(node)
        for tensor in node.output:
            append_pair(tensor)
    del graph.node[:]
    graph.node.extend(nodes)


def _make_pair(graph: onnx.GraphProto, pair: Pair, base: str) -> list[onnx.NodeProto]:
    zero_type = np.int8 if pair.dtype == TensorProto.INT8 else np.uint8
    graph.initializer.append(numpy_helper.from_array(np.array(pair.scale, np.float32), f"{base}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(pair.zero_point, zero_type), f"{base}_zero_point"))
    scale = [f"{base}_scale", f"{base}_zero_point"]
    return [
        helper.make_node("QuantizeLinear", [base, *scale], [f"{base}_Q"], f"{base}_Q"),
        helper.make_node("DequantizeLinear", [f"{base}_Q", *scale], [f"{base}_DQ"], f"{base}_DQ"),
    ]


def _pairs_in_blocks(
    graph: onnx.GraphProto,
    convs: dict[str, onnx.NodeProto],
    state: QuantState,
    pairs: dict[str, Pair],
    activation_type: tuple[int, int],
) -> dict[str, Pair]:
    """Return tensor -> Q/DQ pair for tensors inside Conv blocks. ONNX Runtime needs them to run convolutions and SiLU in INT8.

    The output of a convolution without an activation is a tensor between layers. If such a tensor is float, it has no pair.
    """
    dtype, zero_point = activation_type
    readers = readers_of(graph)
    inner: dict[str, Pair] = {}
    for name, conv in convs.items():
        made = conv.output[0]
        if made not in pairs and activation_output(graph, conv)[0] != made:
            inner[made] = Pair(state.outputs[name] / QMAX, dtype, zero_point)
        for node in readers.get(made, ()):
            output = activation_output(graph, conv)[0]
            if node.op_type == "Sigmoid" and node.output[0] not in pairs and output in pairs:
                # A sigmoid is between 0 and 1. With zero point 0 it uses all 256 values.
                inner[node.output[0]] = Pair(1 / 255, dtype, 0)
                if dtype == TensorProto.UINT8 and _is_silu(readers, made, node.output[0], output):
                    scale, zero = before_silu(state.outputs[name], pairs[output].scale * QMAX)
                    inner[made] = Pair(scale, dtype, zero)
    return inner


def _is_silu(readers: dict[str, list[onnx.NodeProto]], made: str, sigmoid: str, output: str) -> bool:
    """Return whether `output` is the product of a convolution's output and its sigmoid."""
    return any(
        node.op_type == "Mul" and set(node.input) == {made, sigmoid} and output in node.output for node in readers[made]
    )


def _check(graph: onnx.GraphProto, names: Iterable[str], counts: Counts, out: Path) -> None:
    """Check that the graph has exactly the planned Q/DQ nodes. Check that planned convolutions read INT8 inputs and weights."""
    kinds = [node.op_type for node in graph.node]
    pairs = counts.activations + counts.outputs
    got = kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")
    if got != (pairs, pairs + counts.convs):
        raise CompressError(
            f"{out}: {got} Q and DQ nodes, expected {(pairs, pairs + counts.convs)}; report this as a bug"
        )
    dequantised = set[str]()
    for node in graph.node:
        values = node.input if node.op_type == "Concat" else node.input[:1]
        if node.op_type == "DequantizeLinear" or (node.op_type in FORWARDING and set(values) <= dequantised):
            dequantised |= set(node.output)
    int8 = {node.input[1] for node in graph.node if node.op_type == "Conv" and set(node.input[:2]) <= dequantised}
    if not_int8 := [name for name in names if f"{name}.weight_dequantized" not in int8]:
        raise CompressError(f"{out}: planned INT8 convolutions are float: {', '.join(not_int8)}; report this as a bug")
