"""A view of an ONNX graph for rules: who makes and reads a tensor, what is constant, where codes come from and go to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from yolo_compress.errors import CorruptArtifact
from yolo_compress.lint.node import DQ, Codes, Q, attribute, constant_of, name_of

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
# They move or select values and compute none, so that TensorRT carries a DQ forward and a Q backward through them.
# Resize and Upsample only in mode nearest.
CARRIES = frozenset(
    {
        "MaxPool",
        "Concat",
        "Resize",
        "Upsample",
        "Reshape",
        "Transpose",
        "Slice",
        "Split",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
    }
)
ROUNDED_BIN = 0.1  # of a bin: INT8 codes of the weights 0 to 15 are off by 0.06 at most


class Graph:
    """See the head of the file.

    Attributes:
        model: the model; graphs inside nodes (If, Loop) are not looked at.
        source: name of the file, for errors.
        contradiction: why types and shapes could not be inferred, None if they could.
        opset: version of ONNX's own operators.
        nodes: without Constant, in order.
        inputs: true inputs, without initializers.
        outputs: names.
        types, shapes: element type and shape of a tensor, where known; an open dimension is None.
    """

    def __init__(self, model: onnx.ModelProto, source: str = "graph", contradiction: str | None = None) -> None:
        self.model, self.source, self.contradiction = model, source, contradiction
        graph = model.graph
        self.opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
        self._constants: dict[str, TensorProto] = {item.name: item for item in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self._constants[node.output[0]] = constant_of(node)
        self.nodes = [node for node in graph.node if node.op_type != "Constant"]
        self.inputs = [item for item in graph.input if item.name not in self._constants]
        self.outputs = [item.name for item in graph.output]
        self.types = {name: item.data_type for name, item in self._constants.items()}
        self.shapes: dict[str, tuple[int | None, ...]] = {
            name: tuple(item.dims) for name, item in self._constants.items()
        }
        for info in (*graph.input, *graph.output, *graph.value_info):
            tensor = info.type.tensor_type
            if tensor.elem_type:
                self.types.setdefault(info.name, tensor.elem_type)
            if tensor.HasField("shape"):
                dims = (dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
                self.shapes.setdefault(info.name, tuple(dims))
        self.maker: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._values: dict[str, np.ndarray] = {}
        self._sources: dict[str, str] = {}
        for node in self.nodes:  # a node stands behind those that make its inputs
            if self._transparent(node):
                self._sources[node.output[0]] = self.source_of(node.input[0])

    # Names and constants

    def label(self, tensor: str) -> str:
        """Name of the node that makes a tensor, or of the tensor."""
        return name_of(self.maker[tensor]) if tensor in self.maker else tensor

    def value(self, tensor: str) -> np.ndarray | None:
        """A stored tensor, None if it is computed.

        Raises:
            CorruptArtifact: Its bytes do not fit its shape and type.
        """
        tensor = self.source_of(tensor)
        if tensor not in self._constants:
            return None
        if tensor not in self._values:
            try:
                self._values[tensor] = numpy_helper.to_array(self._constants[tensor])
            except (ValueError, TypeError, KeyError) as error:
                raise CorruptArtifact(f"{self.source}: tensor {tensor} is damaged: {error}; export it again") from error
        return self._values[tensor]

    def constants(self) -> Iterator[tuple[str, int]]:
        """(name, element type) of every stored tensor."""
        for name, item in self._constants.items():
            yield name, item.data_type

    def is_constant(self, tensor: str) -> bool:
        """Stored, or made from stored codes or weights by Q and DQ alone."""
        while True:
            tensor = self.source_of(tensor)
            if tensor in self._constants:
                return True
            node = self.maker.get(tensor)
            if node is None or node.op_type not in (Q, DQ):
                return False
            tensor = node.input[0]

    # One step

    def _transparent(self, node: NodeProto) -> bool:
        """Identity, and casts to the type that is there (ModelOpt's exporter leaves them behind its Q/DQ)."""
        if node.op_type == "Cast":
            kind = self.types.get(node.input[0])
            return kind is not None and kind == attribute(node, "to", 0)
        return node.op_type == "Identity"

    def source_of(self, tensor: str) -> str:
        """The tensor without the nodes that do nothing."""
        return self._sources.get(tensor, tensor)

    def readers(self, tensor: str) -> list[tuple[NodeProto | None, str]]:
        """(node, name under which it reads), past the nodes that do nothing; node None is an output of the graph."""
        found: list[tuple[NodeProto | None, str]] = []
        stack: list[tuple[NodeProto | None, str]] = [(None, tensor)]
        while stack:
            node, name = stack.pop()
            if node is not None and not self._transparent(node):
                found.append((node, name))
                continue
            made = name if node is None else node.output[0]
            if made in self.outputs:
                found.append((None, made))
            stack += [(reader, made) for reader in reversed(self._readers.get(made, []))]
        return found

    def carried(self, node: NodeProto, through: Iterable[str] = CARRIES) -> list[str]:
        """The inputs whose values a node passes on unchanged; empty if it computes."""
        if node.op_type not in through or node.op_type not in CARRIES:
            return []
        if node.op_type in ("Resize", "Upsample") and attribute(node, "mode", b"nearest") != b"nearest":
            return []
        inputs = node.input if node.op_type == "Concat" else node.input[:1]
        return [name for name in inputs if not self.is_constant(name) or self.codes_of(name)]

    # Quantisation

    def codes(self, node: NodeProto) -> Codes:
        """Reads a Q or DQ node."""
        scale = self.value(node.input[1])
        has_zero = len(node.input) > 2 and bool(node.input[2])
        zero = self.value(node.input[2]) if has_zero else np.zeros(1, np.int8)
        coded = node.input[0] if node.op_type == DQ else node.output[0]
        kind = self.types.get(self.source_of(node.input[2])) if has_zero else self.types.get(coded)
        if not kind:  # the standard: UINT8 where nothing says otherwise
            kind = int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8
        scale_type = self.types.get(self.source_of(node.input[1]), TensorProto.FLOAT)
        return Codes(node, scale, zero, int(kind), int(attribute(node, "axis", 1)), scale_type)

    def codes_of(self, tensor: str) -> Codes | None:
        """Of the DQ node that makes a tensor, None if another node does."""
        node = self.maker.get(self.source_of(tensor))
        return self.codes(node) if node is not None and node.op_type == DQ else None

    def quantizers(self, op: str = Q) -> Iterator[Codes]:
        """Q (or DQ) nodes of features; those of weights and biases are left out."""
        for node in self.nodes:
            if node.op_type == op and not self.is_constant(node.input[0]):
                yield self.codes(node)

    def origins(self, tensor: str, through: Iterable[str] = CARRIES) -> list[str]:
        """Tensors whose values arrive, walking back through nodes that pass values on."""
        found: dict[str, None] = {}
        seen: set[str] = set()
        stack = [tensor]
        while stack:
            name = self.source_of(stack.pop())
            if name in seen:
                continue
            seen.add(name)
            node = self.maker.get(name)
            carried = self.carried(node, through) if node is not None else []
            stack += reversed(carried)
            if not carried:
                found[name] = None
        return list(found)

    def ends(self, tensor: str, through: Iterable[str] = CARRIES, also: Iterable[str] = ()) -> list[NodeProto | None]:
        """Nodes that read the values of a tensor, walking on through nodes that pass values on and those of `also`."""
        found: list[NodeProto | None] = []
        seen: set[str] = set()
        stack = [tensor]
        while stack:
            for node, name in self.readers(stack.pop()):
                if node is not None and (name in self.carried(node, through) or node.op_type in also):
                    if node.output[0] not in seen:
                        seen.add(node.output[0])
                        stack += node.output
                elif node not in found:
                    found.append(node)
        return found

    def arrives_int8(self, tensor: str) -> bool:
        """Whether all that arrives was dequantised, so that the reader can have codes."""
        return all(self.codes_of(name) is not None for name in self.origins(tensor))

    def is_int8(self, node: NodeProto) -> bool:
        """Whether a node with weights has both of its operands as codes."""
        return self.codes_of(node.input[1]) is not None and self.arrives_int8(node.input[0])

    def weight(self, node: NodeProto) -> str:
        """The stored weight, or its codes, of a node with weights; the operand itself where it is computed."""
        name = self.source_of(node.input[1])
        while name in self.maker and self.maker[name].op_type in (Q, DQ):
            name = self.source_of(self.maker[name].input[0])
        return name

    def channels(self, node: NodeProto) -> tuple[int, int] | None:
        """(in, out) channels of a Conv or ConvTranspose, None where the weight's shape is not known."""
        shape = self.shapes.get(self.weight(node))
        if not shape or len(shape) < 3 or shape[0] is None or shape[1] is None:
            return None
        groups = int(attribute(node, "group", 1))
        if node.op_type == "ConvTranspose":
            return shape[0], shape[1] * groups
        return shape[1] * groups, shape[0]

    @cached_property
    def before_layers(self) -> set[str]:
        """Tensors that a layer with weights reads, at once or later; DFL is no such layer.

        What is not among them is the tail: what the head's output convolutions make, DFL, decode.
        """
        found: set[str] = set()
        for node in reversed(self.nodes):
            if self._is_layer(node) or any(name in found for name in node.output):
                found.update(node.input)
        return found

    def _is_layer(self, node: NodeProto) -> bool:
        """Whether a node has weights that are learnt."""
        product = node.op_type == "MatMul" and self.is_constant(node.input[1])
        return (product or node.op_type in WEIGHTED) and not self.is_dfl(node)

    def is_dfl(self, node: NodeProto) -> bool:
        """Whether a node is DFL: of a softmax over bins it takes the sum weighted 0, 1, 2, ... (of quantised weights, the codes).

        The number of output channels says nothing: a class convolution of one class has one, too.
        """
        bins_N = self.value(self.weight(node))
        if bins_N is None or bins_N.size < 2 or bins_N.size != max(bins_N.shape):
            return False
        bins_N = bins_N.ravel().astype(np.float64)
        step = (bins_N[-1] - bins_N[0]) / (len(bins_N) - 1)
        if not step > 0 or np.abs((bins_N - bins_N[0]) / step - np.arange(len(bins_N))).max() > ROUNDED_BIN:
            return False
        maker = self.maker.get(self.bare(node.input[0]))
        while maker is not None and maker.op_type in CARRIES:
            maker = self.maker.get(self.bare(maker.input[0]))
        return maker is not None and maker.op_type == "Softmax"

    def upstream(self, tensor: str) -> set[str]:
        """Every tensor that a tensor is computed from."""
        seen: set[str] = set()
        stack = [tensor]
        while stack:
            node = self.maker.get(stack.pop())
            for name in node.input if node is not None else ():
                if name not in seen:
                    seen.add(name)
                    stack.append(name)
        return seen

    def bare(self, tensor: str) -> str:
        """The tensor behind Q/DQ pairs and casts."""
        tensor = self.source_of(tensor)
        while tensor in self.maker and self.maker[tensor].op_type in (Q, DQ, "Cast"):
            tensor = self.source_of(self.maker[tensor].input[0])
        return tensor
