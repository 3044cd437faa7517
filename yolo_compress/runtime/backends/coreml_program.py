"""Write a CoreML ML program layer by layer from an ONNX graph, with coremltools' builder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from ..errors import EngineError
from .onnx_graph import DEQUANTIZE, QUANTIZE, Fault, Graph, Node, refuse, slice_bounds, unknown

INPUT, OUTPUT = "images", "output0"
SILU = "Silu"  # a sigmoid and the product with its input: one layer in CoreML
WEIGHT = "constexpr_affine_dequantize"  # INT8 weights with their scales
# Type of an ONNX node -> type of the CoreML layer.
LAYERS = {
    "Add": "add", "Cast": "cast", "Concat": "concat", "Conv": "conv", "Div": "real_div", "Exp": "exp", "Gather": "slice_by_index",
    "LeakyRelu": "leaky_relu", "MatMul": "matmul", "MaxPool": "max_pool", "Mul": "mul", "ReduceMax": "reduce_max", "Relu": "relu",
    "Reshape": "reshape", "Resize": "upsample_nearest_neighbor", "Sigmoid": "sigmoid", SILU: "silu", "Slice": "slice_by_index",
    "Softmax": "softmax", "Split": "split", "Sub": "sub", "Transpose": "transpose", QUANTIZE: "quantize", DEQUANTIZE: "dequantize",
}  # fmt: skip
# [anchors, classes], and [anchors, 4]: x, y of the centre, width, height, from 0 to 1
RAW = ("raw_confidence", "raw_coordinates")
VISION = {"mul": 2, "slice_by_index": 2, "transpose": 2}  # layers of `_for_vision`, and the division of pixels by 255
TYPES = {1: "fp32", 10: "fp16"}  # element type of ONNX -> number type of CoreML
Values = Dict[str, Any]  # ONNX tensor -> value of coremltools' builder, or an array


def with_silu(graph: Graph) -> Graph:
    """Return the graph with one node for each sigmoid whose only reader multiplies it by its input."""
    readers: Dict[str, List[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    nodes, inside = [], set()
    for node in graph.nodes:
        after = readers.get(node.outputs[0], [])
        if node.kind == "Sigmoid" and len(after) == 1 and after[0].kind == "Mul":
            if set(after[0].inputs) == {node.inputs[0], node.outputs[0]}:
                nodes.append(Node(SILU, node.name, node.inputs, after[0].outputs, {}))
                inside.add(after[0].outputs[0])
                continue
        if node.outputs[0] not in inside:
            nodes.append(node)
    return graph._replace(nodes=nodes)


def faults(graph: Graph) -> Iterator[Fault]:
    """Yield the nodes of a graph that have no layer here."""
    yield from unknown(graph, LAYERS)


def require_supported(graph: Graph, file: Path, precision: str) -> None:
    """Raise EngineError if a node has no layer here, or CoreML takes none of its scales."""
    refuse(faults(graph), file, "CoreML")
    for node in graph.nodes:
        if node.kind == DEQUANTIZE and len(node.inputs) > 2 and graph.constants[node.inputs[2]].any():
            raise EngineError(f"{file}: {node.outputs[0]} has a zero point; CoreML is built from int8-tensorrt11.onnx")
    if precision == "int8" and not any(node.kind == QUANTIZE for node in graph.nodes):
        raise EngineError(f"{file}: int8 requested, but the graph has no Q/DQ nodes; use the int8 export")


def named(tensor: str) -> str:
    """Return the name of an ONNX tensor as CoreML takes it: letters, digits and underscores."""
    return re.sub(r"\W", "_", tensor.strip("/"))


def program_of(coremltools: Any, graph: Graph, vision: bool) -> Any:
    """Return the ML program: one layer for each node of the graph, with the name of its output."""
    from coremltools.converters.mil import Builder

    shape = graph.shapes[graph.input]

    @Builder.program(input_specs=[Builder.TensorSpec(shape=shape)], opset_version=coremltools.target.iOS17)  # type: ignore[untyped-decorator,unused-ignore]
    def program(images: Any) -> Any:
        if vision:
            images = Builder.mul(x=images, y=np.float32(1 / 255), name="from_pixels")
        values: Values = {**graph.constants, graph.input: images}
        for node in graph.nodes:
            made = _layer(Builder, node, values, graph.shapes)
            values.update(zip(node.outputs, made if len(node.outputs) > 1 else [made]))
        return _for_vision(Builder, values[graph.output], shape[2:]) if vision else values[graph.output]

    return program


def _for_vision(build: Any, output: Any, imgsz: Sequence[int]) -> Tuple[Any, Any]:
    """Return `RAW` from `output0`, which is [1, 4 + classes, anchors] with boxes in px."""
    rows = output.shape[1]
    parts = [
        _sliced(build.slice_by_index, output, {0: (0, 1), 1: bounds}, [0], name)
        for bounds, name in (((0, 4), "boxes"), ((4, rows), "scores"))
    ]
    boxes_A4 = build.transpose(x=parts[0], perm=[1, 0], name="boxes_by_anchor")
    sides = 1 / np.array([imgsz[1], imgsz[0]] * 2, np.float32)
    return build.transpose(x=parts[1], perm=[1, 0], name=RAW[0]), build.mul(x=boxes_A4, y=sides, name=RAW[1])


def _layer(build: Any, node: Node, values: Values, shapes: Dict[str, Tuple[int, ...]]) -> Any:
    """Add the layer of a node. Return its output, or a list of its outputs."""
    inputs: List[Any] = [values.get(name) for name in node.inputs]
    output, about = node.outputs[0], node.attributes
    x, name = inputs[0], OUTPUT if output == OUTPUT else named(output)
    add = getattr(build, LAYERS[node.kind])
    if node.kind in ("Sigmoid", "Exp", "Relu", SILU):
        return add(x=x, name=name)
    if node.kind in ("Add", "Sub", "Mul", "Div", "MatMul"):
        return add(x=x, y=inputs[1], name=name)
    if node.kind == "Cast":
        return add(x=x, dtype=TYPES[about["to"]], name=name)
    if node.kind == "LeakyRelu":
        return add(x=x, alpha=np.asarray(about.get("alpha", 0.01), _dtype(x)), name=name)
    if node.kind == "Concat":
        return add(values=inputs, axis=about["axis"], name=name)
    if node.kind == "Split":
        names = [named(one) for one in node.outputs]
        return build.split(
            x=x, split_sizes=[shapes[one][about["axis"]] for one in node.outputs], axis=about["axis"], name=names[0]
        )
    if node.kind == "Reshape":
        return add(x=x, shape=list(shapes[output]), name=name)
    if node.kind == "Transpose":
        return add(x=x, perm=about["perm"], name=name)
    if node.kind == "Softmax":
        return add(x=x, axis=about.get("axis", -1), name=name)
    if node.kind == "ReduceMax":
        axes = about["axes"] if len(inputs) < 2 else inputs[1]
        return add(x=x, axes=[int(axis) for axis in axes], keep_dims=bool(about.get("keepdims", 1)), name=name)
    if node.kind == "Resize":
        height, width = (now / was for now, was in zip(shapes[output][2:], shapes[node.inputs[0]][2:]))
        return add(x=x, scale_factor_height=int(height), scale_factor_width=int(width), name=name)
    if node.kind == "Slice":
        return _sliced(add, x, slice_bounds(inputs, shapes[node.inputs[0]]), [], name)
    if node.kind == "Gather":  # one place along an axis, which disappears
        axis, place = about["axis"], int(inputs[1])
        return _sliced(add, x, {axis: (place, place + 1)}, [axis], name)
    if node.kind == QUANTIZE:
        return add(input=x, scale=inputs[1], output_dtype="int8", name=name)
    if node.kind == DEQUANTIZE and isinstance(x, np.ndarray):
        return build.constexpr_affine_dequantize(
            quantized_data=x, zero_point=np.int8(0), scale=inputs[1], axis=np.int32(about.get("axis", 1)), name=name
        )
    if node.kind == DEQUANTIZE:
        return add(input=x, scale=inputs[1], name=name)
    top, left, bottom, right = about.get("pads", [0] * 4)
    window = {
        "strides": about.get("strides", [1, 1]),
        "pad_type": "custom",
        "pad": [top, bottom, left, right],
        "name": name,
    }
    if node.kind == "MaxPool":
        return add(x=x, kernel_sizes=about["kernel_shape"], **window)
    bias = {"bias": inputs[2]} if len(inputs) > 2 else {}
    return add(
        x=x, weight=inputs[1], dilations=about.get("dilations", [1, 1]), groups=about.get("group", 1), **bias, **window
    )


def _dtype(value: Any) -> Any:
    return np.float16 if "fp16" in str(value.dtype) else np.float32


def _sliced(add: Any, x: Any, bounds: Dict[int, Tuple[int, int]], removed: Sequence[int], name: str) -> Any:
    axes = range(len(x.shape))
    begin, end = ([bounds.get(axis, (0, x.shape[axis]))[side] for axis in axes] for side in (0, 1))
    return add(x=x, begin=begin, end=end, squeeze_mask=[axis in removed for axis in axes], name=name)
