"""Convert an ONNX file to LiteRT (`.tflite`): float32, float16 weights, or INT8 with the scales and INT8 values of the file.

The file is written operator by operator: LiteRT's converters take no given scales, and do not install beside this package. Feature maps
are channels last, as LiteRT needs them. Other tensors keep the order of ONNX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from ..errors import EngineError, NotConverted
from . import onnx_graph
from .litert_file import FLOAT32, INSTALL, INT8, Quantised, Writer, schema
from .litert_operators import BINARY, FIRST, LAST, UNARY, same_padding, strides, write
from .onnx_graph import DEQUANTIZE, QUANTIZE, Fault, Graph, Node, Weight, refuse, unknown

SPATIAL = {"Conv", "MaxPool", "Resize"}  # they read feature maps
PLAIN = {
    "Reshape",
    "Transpose",
    "Softmax",
    "MatMul",
    "ReduceMax",
    "Slice",
    "Gather",
}  # they read tensors in the order of ONNX
MOVING = {"Concat", "Split", "MaxPool", "Resize", "Reshape", "Transpose", "Slice"}  # input and output have one scale
IN_INT8 = {"Conv", "Sigmoid", "Relu", "Add", "Mul", *MOVING}
KINDS = {*UNARY, *BINARY, *SPATIAL, *PLAIN, "Concat", "Split", QUANTIZE, DEQUANTIZE, "Cast"}
SIGMOID = Quantised(np.array([1 / 256], np.float32), -128)  # the only scale that LiteRT takes for a sigmoid
LARGEST = 2**31 - 1  # of an INT32 bias, and of its sum with the products


def require() -> None:
    """Check that an ONNX file can be converted here.

    Raises:
        RuntimeUnavailable: LiteRT or onnx is missing.
    """
    schema()
    onnx_graph.require(INSTALL)


def faults(graph: Graph) -> Iterator[Fault]:
    """Yield the nodes of a graph that LiteRT, or this converter, has no operator for."""
    yield from unknown(graph, KINDS)
    quantised = {node.inputs[0] for node in graph.nodes if node.kind == QUANTIZE}
    weights = {node.outputs[0] for node in graph.nodes if node.kind == DEQUANTIZE and node.inputs[0] in graph.constants}
    int8 = [node for node in graph.nodes if node.kind == "Conv" and node.inputs[1] in weights]
    if int8 and not any(node.outputs[0] in quantised for node in int8):
        yield int8[0].label, "and all other convolutions have outputs that are not INT8 as in int8-onnxruntime.onnx"
    for node in graph.nodes:
        about, shape = node.attributes, graph.shapes.get(node.inputs[0], ())
        if node.kind == "Conv" and (
            about.get("group", 1) not in (1, shape[1]) or set(about.get("dilations", [1])) != {1}
        ):
            yield node.label, f"has {about.get('group', 1)} groups or is dilated"
        if node.kind == "MaxPool" and not same_padding(about, shape[2:], about["kernel_shape"]):
            yield node.label, "pads its input otherwise than LiteRT can"
        if node.kind == "Softmax" and about.get("axis", -1) not in (-1, len(shape) - 1):
            yield node.label, "is a Softmax along another axis than the last"


def convert(file: Path, out: Path, imgsz: Sequence[int], precision: str, int8_images: bool = False) -> int:
    """Convert an ONNX file of `export`, write it to `out`, and return the number of image channels.

    With int8, a convolution is INT8 if its input, its weights and its output are INT8 in the ONNX file. Weights have the INT8 values of
    the file, and tensors its scales. Only the outputs of sigmoids have another scale, 1/256 in place of 1/255. A convolution whose
    output is float in the file, as in the attention of YOLO11, computes in float32 with the same INT8 weights times their scales.

    Args:
        imgsz: height and width of the input, px.
        precision: fp32, fp16 (weights stored as float16) or int8.
        int8_images: whether the input is INT8: round(value / scale) + zero point of the input tensor. Else it is float32, 0 to 1.

    Raises:
        RuntimeUnavailable: LiteRT or onnx is missing.
        EngineError: the file takes images of another size or has a layer that is not converted. Or the precision is int8, and the
            file has no Q/DQ nodes, or a convolution in it cannot be INT8.
    """
    require()
    graph = onnx_graph.read(file, imgsz, INSTALL)
    refuse(faults(graph), file, "LiteRT")
    if precision == "int8" and not any(node.kind == QUANTIZE for node in graph.nodes):
        raise EngineError(f"{file}: int8 requested, but the graph has no Q/DQ nodes; use the int8 export")
    Conversion(graph, file, precision == "fp16").write(out, int8_images)
    return graph.shapes[graph.input][1]


class Conversion:
    """The state of one conversion.

    Attributes:
        source: output of a DequantizeLinear or Cast node -> the tensor that it stands for.
        pairs: tensor that is quantised in the ONNX file -> scale and zero point.
        weights: dequantised weights -> INT8 values and scales.
        made: (tensor, whether INT8, whether channels last) -> index of the tensor in the LiteRT file.
    """

    def __init__(self, graph: Graph, file: Path, half: bool) -> None:
        self.graph, self.file, self.half, self.out = graph, file, half, Writer()
        self.source: Dict[str, str] = {}
        self.pairs: Dict[str, Quantised] = {}
        self.weights: Dict[str, Weight] = {}
        self.made: Dict[Tuple[str, bool, bool], int] = {}
        self.dequantised = set()
        stored, quantised = graph.constants, {}
        for node in graph.nodes:
            name, output = node.inputs[0], node.outputs[0]
            if node.kind == "Cast":
                self.source[output] = self.origin(name)
            elif node.kind == QUANTIZE:
                quantised[output] = self.origin(name)
                zero = stored[node.inputs[2]] if len(node.inputs) > 2 else np.zeros(1, np.uint8)
                zero_point = int(zero.reshape(-1)[0]) - (128 if zero.dtype == np.uint8 else 0)
                scale = stored[node.inputs[1]].astype(np.float32).reshape(-1)
                self.pairs[self.origin(name)] = Quantised(scale, zero_point)
            elif node.kind == DEQUANTIZE and name in stored:
                self.weights[output] = Weight(stored[name], stored[node.inputs[1]].astype(np.float32).reshape(-1))
            elif node.kind == DEQUANTIZE:
                self.source[output] = quantised[name]
                self.dequantised.add(output)
        for node in graph.nodes:
            if node.kind == "Sigmoid" and node.outputs[0] in self.pairs:
                self.pairs[node.outputs[0]] = SIGMOID

    def origin(self, name: str) -> str:
        return self.source.get(name, name)

    def write(self, out: Path, int8_images: bool) -> None:
        name = self.graph.input
        if int8_images and name not in self.pairs:
            raise EngineError(f"{self.file}: its images are not INT8; give the int8 export")
        images = self.new(name, int8_images, True)
        for node in self.graph.nodes:
            if node.kind not in (QUANTIZE, DEQUANTIZE, "Cast"):
                self.node(node)
        output = self.read(self.origin(self.graph.output), False, False)
        self.out.write(out, [images], [output], "YOLO detector, written by yolo_compress")

    def shape(self, name: str, last: bool) -> Tuple[int, ...]:
        shape = self.graph.shapes[name]
        return tuple(shape[axis] for axis in LAST) if last else tuple(shape)

    def new(self, name: str, int8: bool, last: bool) -> int:
        """Add the tensor that stands for an ONNX tensor, and return its index."""
        twin = (name, not int8, last) in self.made
        ending = (("_int8" if int8 else "_float") if twin else "") + ("" if last else "_plain")
        index = self.out.tensor(
            name + ending, INT8 if int8 else FLOAT32, self.shape(name, last), self.pairs[name] if int8 else None
        )
        self.made[name, int8, last] = index
        return index

    def read(self, name: str, int8: bool, last: bool) -> int:
        """Return the index of a tensor in this type and order. If needed, it is quantised, dequantised or transposed first."""
        if (name, int8, last) in self.made:
            return self.made[name, int8, last]
        if name in self.graph.constants:
            values = np.asarray(self.graph.constants[name], np.float32)
            if last:
                values = values.reshape((1,) * (4 - values.ndim) + values.shape).transpose(LAST)
            return self.out.constant(f"{name}_{len(self.made)}", values)
        if (name, int8, not last) in self.made:
            before = self.made[name, int8, not last]
            order = self.out.constant(f"{name}_order", np.array(LAST if last else FIRST, np.int32))
            after = self.new(name, int8, last)
            self.out.add("TRANSPOSE", [before, order], [after])
            return after
        before = self.read(name, not int8, last)
        after = self.new(name, int8, last)
        self.out.add("QUANTIZE" if int8 else "DEQUANTIZE", [before], [after])
        return after

    def node(self, node: Node) -> None:
        """Write the operators of an ONNX node."""
        names = [self.origin(name) for name in node.inputs]
        computed = [i for i, name in enumerate(names) if name in self.graph.shapes and name not in self.graph.constants]
        computed = [i for i in computed if node.inputs[i] not in self.weights]
        for i in computed:
            if names[i] in self.pairs and node.inputs[i] not in self.dequantised:
                raise EngineError(f"{self.file}: {node.name} reads {names[i]} beside its Q/DQ nodes; export again")
        pairs = [self.pairs.get(name) for name in (*(names[i] for i in computed), *node.outputs)]
        int8 = node.kind in IN_INT8 and all(pairs) and (node.kind not in BINARY or len(computed) == len(names))
        int8 = int8 and (node.kind not in MOVING or len(set(pairs)) == 1)
        maps = any((names[i], kind, True) in self.made for i in computed for kind in (False, True))
        last = node.kind in SPATIAL or (
            node.kind not in PLAIN and maps and len(self.graph.shapes[node.outputs[0]]) == 4
        )
        if node.kind == "Conv":
            self.conv(node, names, int8)
            return
        if node.kind == "MatMul":
            inputs = []
        elif node.kind in BINARY or node.kind == "Concat":
            inputs = [self.read(name, int8, last) for name in names]
        else:
            inputs = [self.read(names[0], int8, last)]
        outputs = [self.new(name, int8, last) for name in node.outputs]
        write(self, node, names, inputs, outputs, last)

    def integers(self, node: Node, values: Any) -> int:
        return self.out.constant(f"{node.outputs[0]}_numbers", np.array([int(one) for one in values], np.int32))

    def conv(self, node: Node, names: List[str], int8: bool) -> None:
        """Write a convolution: CONV_2D, or DEPTHWISE_CONV_2D if it has one group for each input channel."""
        about, given, stored = node.attributes, self.weights.get(node.inputs[1]), self.graph.constants
        values = given.values if given else stored[names[1]].astype(np.float32)
        channels, groups = self.graph.shapes[names[0]][1], about.get("group", 1)
        int8 = int8 and given is not None
        depthwise = groups == channels and groups > 1
        order, axis = ((1, 2, 3, 0), 3) if depthwise else ((0, 2, 3, 1), 0)
        bias = stored[names[2]].astype(np.float32) if len(names) > 2 else np.zeros(len(values), np.float32)
        output = node.outputs[0]
        if int8 and given:
            values, scale_O = self.fitted(node, names[0], values, given.scale_O, bias)
            step_O = self.pairs[names[0]].scale[0] * scale_O
            int32 = np.rint(bias / step_O.astype(np.float64)).astype(np.int32)
            both = [
                self.out.constant(f"{output}_weight", values.transpose(order), Quantised(scale_O, 0, axis)),
                self.out.constant(f"{output}_bias", int32, Quantised(step_O)),
            ]
        else:
            if given:  # a convolution whose output is float in the ONNX file
                values = values.astype(np.float32) * given.scale_O.reshape(-1, 1, 1, 1)
            both = [
                self.float_constant(f"{output}_weight", values.transpose(order)),
                self.float_constant(f"{output}_bias", bias),
            ]
        read, padding = self.padded(node, names[0], int8, values.shape[2:])
        options = {"depthMultiplier": len(values) // channels} if depthwise else {}
        self.out.add(
            "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [read, *both], [self.new(output, int8, True)],
            padding=padding, **strides(about), **options,
        )  # fmt: skip

    def fitted(
        self, node: Node, name: str, values: np.ndarray, scale_O: np.ndarray, bias: np.ndarray
    ) -> Tuple[np.ndarray, np.ndarray]:
        """Return INT8 weights and scales whose bias fits into 32 bits, in units of input scale times weight scale.

        It does not fit for a channel whose weights are nearly zero. If they change the output by less than half a step of its scale,
        they become zero, and the scale larger.
        """
        step = float(self.pairs[name].scale[0])
        # LiteRT adds the bias and all products in 32 bits
        room_O = LARGEST - 255 * np.abs(values.astype(np.int64)).sum((1, 2, 3))
        least_O = np.abs(bias.astype(np.float64)) / (step * room_O)
        silent_O = least_O >= scale_O
        if not silent_O.any():
            return values, scale_O
        largest_O = np.abs(values.astype(np.float64)).sum((1, 2, 3)) * scale_O * step * 255
        if (largest_O[silent_O] > self.pairs[node.outputs[0]].scale[0] / 2).any():
            raise NotConverted(
                f"{self.file}: the bias of {node.name} does not fit into 32 bits; leave this runtime out"
            )
        kept = np.where(silent_O.reshape(-1, 1, 1, 1), 0, values).astype(np.int8)
        return kept, np.where(silent_O, 2 * least_O, scale_O).astype(np.float32)

    def float_constant(self, name: str, values: np.ndarray) -> int:
        """Add a float32 constant and return its index. For fp16 it is stored as float16."""
        if not self.half:
            return self.out.constant(name, values)
        stored = self.out.constant(f"{name}_half", values.astype(np.float16))
        index = self.out.tensor(name, FLOAT32, values.shape)
        self.out.add("DEQUANTIZE", [stored], [index])
        return index

    def padded(self, node: Node, name: str, int8: bool, window: Sequence[int]) -> Tuple[int, int]:
        """Return the input of a convolution, padded if LiteRT's own padding differs, and LiteRT's padding: 0 (SAME) or 1 (VALID)."""
        read = self.read(name, int8, True)
        top, left, bottom, right = node.attributes.get("pads", [0] * 4)
        if not any((top, left, bottom, right)):
            return read, 1
        if same_padding(node.attributes, self.graph.shapes[name][2:], window):
            return read, 0
        batch, height, width, channels = self.shape(name, True)
        shape = (batch, height + top + bottom, width + left + right, channels)
        index = self.out.tensor(
            f"{node.outputs[0]}_padded", INT8 if int8 else FLOAT32, shape, self.pairs[name] if int8 else None
        )
        borders = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        self.out.add("PAD", [read, self.out.constant(f"{node.outputs[0]}_borders", borders)], [index])
        return index, 1
