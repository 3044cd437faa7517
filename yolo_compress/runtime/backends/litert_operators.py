"""Write the operators of a LiteRT file for ONNX nodes that are no convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Protocol, Sequence, Tuple

import numpy as np

from .litert_file import FLOAT32, Writer
from .onnx_graph import Attributes, Graph, Node, slice_bounds

UNARY = {"Sigmoid": "LOGISTIC", "Exp": "EXP", "Relu": "RELU", "LeakyRelu": "LEAKY_RELU", "Softmax": "SOFTMAX"}
BINARY = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # to channels last, and back


class Conversion(Protocol):
    """What the functions here use of a `litert_convert.Conversion`."""

    graph: Graph
    file: Path
    out: Writer

    def shape(self, name: str, last: bool) -> Tuple[int, ...]: ...

    def read(self, name: str, int8: bool, last: bool) -> int: ...

    def integers(self, node: Node, values: Any) -> int: ...


def write(to: Conversion, node: Node, names: List[str], inputs: List[int], outputs: List[int], last: bool) -> None:
    """Write the operators of a node that is no convolution.

    Args:
        to: the conversion that the operators are added to.
        names: ONNX tensors that the node reads.
        inputs, outputs: tensors of the LiteRT file.
        last: whether they are channels last.
    """
    about, made = node.attributes, to.shape(node.outputs[0], last)
    rank, add = len(made), to.out.add
    if node.kind in BINARY:
        add(BINARY[node.kind], inputs, outputs)
    elif node.kind == "Concat":
        axis = about["axis"] % rank
        add("CONCATENATION", inputs, outputs, axis=LAST.index(axis) if last else axis)
    elif node.kind in UNARY:
        options = {"Softmax": {"beta": 1.0}, "LeakyRelu": {"alpha": about.get("alpha", 0.01)}}.get(node.kind, {})
        add(UNARY[node.kind], inputs, outputs, **options)
    elif node.kind == "Reshape":
        add("RESHAPE", [*inputs, to.integers(node, made)], outputs, newShape=np.array(made, np.int32))
    elif node.kind == "Transpose":
        add("TRANSPOSE", [*inputs, to.integers(node, about["perm"])], outputs)
    elif node.kind == "ReduceMax":
        axes = about["axes"] if len(names) < 2 else to.graph.constants[names[1]]
        add("REDUCE_MAX", [*inputs, to.integers(node, axes)], outputs, keepDims=bool(about.get("keepdims", 1)))
    elif node.kind == "MatMul":
        _matmul(to, names, outputs, len(made))
    elif node.kind == "Resize":
        add("RESIZE_NEAREST_NEIGHBOR", [*inputs, to.integers(node, made[1:3])], outputs)
    elif node.kind == "MaxPool":
        window = about["kernel_shape"]
        add(
            "MAX_POOL_2D", inputs, outputs, padding=0,
            filterHeight=window[0], filterWidth=window[1], **strides(about),
        )  # fmt: skip
    else:
        _sliced(to, node, names, inputs[0], outputs, last)


def _sliced(to: Conversion, node: Node, names: List[str], read: int, outputs: List[int], last: bool) -> None:
    """Write a Split, Slice or Gather node."""
    about, shape = node.attributes, to.graph.shapes[names[0]]
    bounds: List[Dict[int, Tuple[int, int]]] = []
    if node.kind == "Split":
        ends = np.cumsum([to.graph.shapes[name][about["axis"]] for name in node.outputs]).tolist()
        bounds = [{about["axis"]: both} for both in zip([0, *ends], ends)]
    elif node.kind == "Slice":
        bounds = [slice_bounds([to.graph.constants.get(name) for name in names], shape)]
    else:
        place = int(to.graph.constants[names[1]])
        bounds = [{about["axis"]: (place, place + 1)}]
    for part, written in zip(bounds, outputs):
        whole = [part.get(axis, (0, shape[axis])) for axis in (LAST if last else range(len(shape)))]
        begin, size = [first for first, _ in whole], [end - first for first, end in whole]
        target = written
        if node.kind == "Gather":  # the axis of one place disappears
            target = to.out.tensor(node.outputs[0] + "_with_axis", FLOAT32, size)
        to.out.add("SLICE", [read, to.integers(node, begin), to.integers(node, size)], [target])
        if node.kind == "Gather":
            rest = to.graph.shapes[node.outputs[0]]
            new_shape = np.array(rest, np.int32)
            to.out.add("RESHAPE", [target, to.integers(node, rest)], [written], newShape=new_shape)


def _matmul(to: Conversion, names: List[str], outputs: List[int], rank: int) -> None:
    read = []
    for name in names:
        if name in to.graph.constants:
            values = to.graph.constants[name].astype(np.float32)
            read.append(to.out.constant(name, values.reshape((1,) * (rank - values.ndim) + values.shape)))
        else:
            read.append(to.read(name, False, False))
    to.out.add("BATCH_MATMUL", read, outputs)


def strides(about: Attributes) -> Dict[str, int]:
    height, width = about.get("strides", [1, 1])
    return {"strideH": height, "strideW": width}


def same_padding(about: Attributes, sizes: Sequence[int], window: Sequence[int]) -> bool:
    """Return whether LiteRT's padding SAME pads as the node does."""
    pads, strides = about.get("pads", [0] * 4), about.get("strides", [1, 1])
    for axis, (size, side, stride) in enumerate(zip(sizes, window, strides)):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        if [pads[axis], pads[axis + 2]] != [total // 2, total - total // 2]:
            return False
    return True
