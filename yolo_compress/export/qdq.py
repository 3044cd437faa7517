"""INT8 as a float ONNX graph plus ranges: explicit QuantizeLinear and DequantizeLinear nodes, typed for the runtime.

Every form gets the same scales on the same tensors and the same INT8 weights (an output channel each, symmetric, axis 0, in
the bits that they were trained in), float bias, no change of opset. A tensor has one pair, behind the node that makes it, and
every reader reads through it; so has what a pool, an upsampling, a chunk or a concatenation makes of INT8 tensors: with the one
scale of its inputs that pair moves no value, and says to any importer that the layer is INT8.

`runtime.registry.Int8File` says how the forms differ:

* zero point 0, INT8 activations: TensorRT takes no other zero point and no INT32 bias. Zero point 128, UINT8 activations: the
  same codes moved by 128.
* half: scales that float16 holds exactly, since TensorRT 11 takes precision from the graph's types and `fp16.to_fp16` gives
  everything between the codes that type; opset 19.
* quantised outputs: with `state.outputs` the outputs of convolutions and sigmoids are quantised, too.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.export.float_onnx import MIN_OPSET, quiet_trace, write_metadata
from yolo_compress.quant.plan import IMAGES
from yolo_compress.quant.ranges import QMAX, QuantState
from yolo_compress.runtime.registry import Int8File, qdq_forms

FORMS = qdq_forms()
# What activations are made of: one node (ReLU), or several that read nothing but the convolution and constants (SiLU, Mish, GELU).
ELEMENTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max", "Min", "Mish",
    "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sub", "Tanh", "ThresholdedRelu",
}  # fmt: skip
PASSING = {"MaxPool", "Resize", "Split", "Concat"}  # layers that only move values: codes in, the same codes out


@dataclass(frozen=True)
class Counts:
    """What was put in: convolutions in INT8, Q/DQ pairs of the plan's tensors and of what passes them on, and others."""

    convs: int
    activations: int
    outputs: int


@dataclass(frozen=True)
class Pair:
    """One Q/DQ pair."""

    amax: float
    dtype: int
    zero_point: int

    @property
    def scale(self) -> float:
        """Of one code."""
        return self.amax / QMAX

    @property
    def half(self) -> Pair:
        """With the next larger scale that float16 holds."""
        return replace(self, amax=float(_half_up(np.array(self.scale, np.float32))) * QMAX)


def insert_qdq(float_onnx: Path, out: Path, state: QuantState, form: str) -> Counts:
    """Write the INT8 form of a float graph.

    The counts are checked against the graph that was made.

    Args:
        float_onnx: What `export_onnx` wrote, opset 13 or more. Read only.
        out: File to write.
        state: Ranges with BatchNorm folded (`state.fold`), of the network in `float_onnx`.
        form: Key of `FORMS`.

    Raises:
        RecipeError: Unknown form.
        CorruptArtifact: Graph and state do not belong together (a convolution is missing, has other channels, ...).
        CompressError: The graph made is not as planned.
    """
    if form not in FORMS:
        raise RecipeError(f"Q/DQ form {form!r} is unknown; there are {', '.join(FORMS)}")
    file = FORMS[form]
    if not state.folded:
        raise CorruptArtifact("quantiser state: BatchNorm is not folded into it; call fold() with the trained model")
    model = onnx.load(str(float_onnx))
    graph = model.graph
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if opset < MIN_OPSET:
        raise CorruptArtifact(f"{float_onnx}: opset {opset}, Q/DQ an output channel needs {MIN_OPSET}; export again")
    convs = find_convs(graph, state.convs)
    amax = tensor_ranges(graph, state)
    pairs = {tensor: Pair(value, *_codes(file)) for tensor, value in amax.items()}
    if file.half:
        pairs = {tensor: pair.half for tensor, pair in pairs.items()}
    elsewhere = (
        _inner_pairs(graph, convs, state, pairs, _codes(file)) if file.quantised_outputs and state.outputs else {}
    )
    for name, conv in convs.items():
        quantise_weight(graph, name, conv, state.weights[name], state.weight_qmax, half=file.half)
    insert_pairs(graph, pairs | elsewhere)
    counts = Counts(len(convs), len(pairs), len(elsewhere))
    _check(graph, state.convs, counts, out)
    write_metadata(model, {"precision": "int8"})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(out))
    return counts


def _codes(file: Int8File) -> tuple[int, int]:
    """Element type and zero point of a form's activations."""
    assert file.zero_point is not None
    return (TensorProto.UINT8 if file.zero_point else TensorProto.INT8), file.zero_point


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


def _half_up(scale: np.ndarray) -> np.ndarray:
    """The smallest float16 values that are not below, as float32: nothing is clipped that was not before."""
    half = scale.astype(np.float16)
    half = np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)
    return half.astype(np.float32)


def quantise_weight(
    graph: onnx.GraphProto, name: str, conv: onnx.NodeProto, amax_C: Sequence[float], qmax: int, half: bool = False
) -> None:
    """Replace a float weight by INT8 codes and a DequantizeLinear an output channel (put before all other nodes).

    With `half` the scale in the graph is one that float16 holds; the codes are the same.
    """
    stored = next((item for item in graph.initializer if item.name == conv.input[1]), None)
    if stored is None:
        raise CorruptArtifact(f"{name}: the weight of the ONNX convolution is computed, not stored; export again")
    weight = numpy_helper.to_array(stored)
    if len(weight) != len(amax_C):
        raise CorruptArtifact(f"{name}: {len(weight)} output channels in the ONNX graph, {len(amax_C)} in the state")
    codes, scale_C = coded(weight, amax_C, qmax)
    scale_C = _half_up(scale_C) if half else scale_C
    parts: dict[str, np.ndarray] = {"quantized": codes, "scale": scale_C, "zero_point": np.zeros(len(scale_C), np.int8)}
    graph.initializer.remove(stored)
    graph.initializer.extend(numpy_helper.from_array(array, f"{name}.weight_{key}") for key, array in parts.items())
    inputs = [f"{name}.weight_{key}" for key in parts]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}.weight_dequantized"], f"{name}.weight_DQ", axis=0)
    graph.node.insert(0, node)
    conv.input[1] = node.output[0]


def coded(weight: np.ndarray, amax_C: Sequence[float], qmax: int) -> tuple[np.ndarray, np.ndarray]:
    """INT8 codes of a weight, rounded as in training (`fakequant`), and scale_C."""
    amax = np.asarray(amax_C, np.float32)
    codes = np.rint(weight * (np.float32(qmax) / amax).reshape(-1, 1, 1, 1)).clip(-qmax, qmax).astype(np.int8)
    return codes, amax / np.float32(qmax)


def tensor_ranges(graph: onnx.GraphProto, state: QuantState) -> dict[str, float]:
    """amax of every INT8 tensor of a float graph: of the tensors of `state`, and of what layers that only move values make of them.

    Raises:
        CorruptArtifact: A block or a sum is not in the graph, or a concatenation would join codes of different scales, or
            codes and float.
    """
    return _passed_on(graph, _tensors(graph, state))


def _tensors(graph: onnx.GraphProto, state: QuantState) -> dict[str, float]:
    """The ONNX tensor of each tensor of `state`, with its amax."""
    readers = readers_of(graph)
    sums = {name: last for name in state.activations if (last := _end_of_branch(graph, name, state))}
    blocks = [name for name in state.activations if name not in (IMAGES, *sums)]
    convs = find_convs(graph, [f"{name}.conv" for name in blocks])
    made = {name: activated(graph, convs[f"{name}.conv"])[0] for name in blocks} | {IMAGES: graph.input[0].name}
    for name, last in sums.items():
        adds = [node.output[0] for node in readers.get(made[last], ()) if node.op_type == "Add"]
        if len(adds) != 1:
            raise CorruptArtifact(f"{name}: {len(adds)} sums of the ONNX graph read {last}, expected 1")
        made[name] = adds[0]
    return {made[name]: amax for name, amax in state.activations.items()}


def _end_of_branch(graph: onnx.GraphProto, name: str, state: QuantState) -> str:
    """The last block inside the module `name` that makes a tensor of `state`, where the module is a sum; "" for a block."""
    blocks = [node.input[1].removesuffix(".conv.weight") for node in graph.node if node.op_type == "Conv"]
    inside = [block for block in blocks if block.startswith(f"{name}.") and block in state.activations]
    return inside[-1] if inside and name not in blocks else ""


def activated(graph: onnx.GraphProto, conv: onnx.NodeProto) -> tuple[str, set[str]]:
    """What a block gives, the last tensor of its activation, and all tensors from the convolution's output to it.

    Raises:
        CorruptArtifact: The activation has several ends, or is made of nodes that are not known to be elementwise.
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
            f"{conv.name}: its activation gives {', '.join(sorted(ends)) or 'nothing'}, expected one tensor"
        )
    return next(iter(ends)), inside


def check_activation(act: nn.Module, opset: int) -> None:
    """Refuse an activation that the INT8 files cannot hold, before any training.

    Raises:
        RecipeError: It is no elementwise function of nodes in `ELEMENTWISE`.
    """
    file = io.BytesIO()
    with torch.no_grad(), quiet_trace():
        net = nn.Sequential(nn.Conv2d(1, 1, 1), act).eval()
        try:
            torch.onnx.export(net, (torch.zeros(1, 1, 2, 2),), file, opset_version=opset, dynamo=False)
        except Exception as error:  # torch's exporter raises whatever its symbolic functions do
            reason = str(error).splitlines()[0]
            raise RecipeError(
                f"activation {type(act).__name__}: ONNX of opset {opset} cannot hold it: {reason}"
            ) from error
    graph = onnx.load_from_string(file.getvalue()).graph
    conv = next(node for node in graph.node if node.op_type == "Conv")
    if strange := {node.op_type for node in graph.node} - ELEMENTWISE - {"Conv", "Constant", "Identity"}:
        raise RecipeError(
            f"activation {type(act).__name__}: INT8 files cannot hold it (ONNX {', '.join(sorted(strange))}); leave the section qat "
            "out and set export.precisions=fp32,fp16"
        )
    activated(graph, conv)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, in the order of the graph."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            found.setdefault(tensor, []).append(node)
    return found


def _passed_on(graph: onnx.GraphProto, amax: dict[str, float]) -> dict[str, float]:
    amax = dict(amax)
    for node in graph.node:
        if node.op_type not in PASSING:
            continue
        parts = node.input if node.op_type == "Concat" else node.input[:1]
        ranges = {amax.get(tensor) for tensor in parts}
        if ranges == {None}:
            continue
        if len(ranges) > 1:
            raise CorruptArtifact(
                f"quantiser state: {node.name} joins tensors with ranges {sorted(map(str, ranges))}, expected one"
            )
        amax |= dict.fromkeys(node.output, ranges.pop() or 0.0)
    return amax


def insert_pairs(graph: onnx.GraphProto, pairs: dict[str, Pair]) -> None:
    """Put each pair behind the node that makes its tensor, and let all readers read it; in place."""
    nodes: list[onnx.NodeProto] = []

    def put_behind(tensor: str) -> None:
        if tensor in pairs:
            nodes.extend(_make_pair(graph, pairs[tensor], tensor))

    for item in graph.input:
        put_behind(item.name)
    for node in list(graph.node):
        for index, tensor in enumerate(node.input):
            if tensor in pairs:
                node.input[index] = f"{tensor}_DQ"
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
        helper.make_node("QuantizeLinear", [base, *scale], [f"{base}_Q"], f"{base}_Q"),
        helper.make_node("DequantizeLinear", [f"{base}_Q", *scale], [f"{base}_DQ"], f"{base}_DQ"),
    ]


def _inner_pairs(
    graph: onnx.GraphProto,
    convs: dict[str, onnx.NodeProto],
    state: QuantState,
    pairs: dict[str, Pair],
    codes: tuple[int, int],
) -> dict[str, Pair]:
    """Pairs inside of blocks, without which ONNX Runtime runs neither convolution nor SiLU in INT8."""
    dtype, zero_point = codes
    readers = readers_of(graph)
    inner: dict[str, Pair] = {}
    for name, conv in convs.items():
        made = conv.output[0]
        if made not in pairs:
            inner[made] = Pair(state.outputs[name], dtype, zero_point)
        for node in readers.get(made, ()):
            if node.op_type == "Sigmoid" and node.output[0] not in pairs and activated(graph, conv)[0] in pairs:
                # A sigmoid fills 0 to 1 and nothing else: all 256 codes, from 0.
                inner[node.output[0]] = Pair(QMAX / 255, dtype, 0)
    return inner


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
