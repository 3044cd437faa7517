"""Queries on an ONNX graph for the rules: producers, readers and constants, and which tensors are INT8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from yolo_compress.errors import CorruptArtifact
from yolo_compress.lint.node import DQ, Q, QuantParams, attribute, constant_of, name_of

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
# These operators move or select values and compute none. TensorRT moves a DQ forward and a Q backward through them.
# Resize and Upsample do so only in mode nearest.
FORWARDING_OPS = frozenset(
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
ROUNDED_BIN = 0.1  # tolerance in bins: the weights 0 to 15 as INT8 differ by at most 0.06


class Graph:
    """An ONNX graph with indexes of its tensors and nodes.

    Attributes:
        model: the ONNX model; graphs inside nodes (If, Loop) are not examined.
        source: file name for error messages.
        contradiction: error of the type and shape inference, None if it succeeded.
        opset: version of the standard ONNX operator set.
        nodes: all nodes except Constant, in the order of the file.
        inputs: graph inputs without initializers.
        outputs: names of the graph outputs.
        types: element type of each tensor for which it is known.
        shapes: shape of each tensor for which it is known; a dynamic dimension is None.
        producer: the node that computes each tensor.
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
        self.producer: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._values: dict[str, np.ndarray] = {}
        self._sources: dict[str, str] = {}
        for node in self.nodes:  # in topological order, so the producers of its inputs come first
            if self._is_noop(node):
                self._sources[node.output[0]] = self.source_of(node.input[0])

    # Names and constants

    def label(self, tensor: str) -> str:
        """Return the name of the node that computes a tensor, or the tensor's name if no node does."""
        return name_of(self.producer[tensor]) if tensor in self.producer else tensor

    def value(self, tensor: str) -> np.ndarray | None:
        """Return the value of a stored tensor, or None if the tensor is computed.

        Raises:
            CorruptArtifact: The stored bytes do not match the shape and type.
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
        """Yield (name, element type) of every stored tensor."""
        for name, item in self._constants.items():
            yield name, item.data_type

    def is_constant(self, tensor: str) -> bool:
        """Return whether a tensor is stored, or is computed from a stored tensor by Q and DQ nodes only."""
        while True:
            tensor = self.source_of(tensor)
            if tensor in self._constants:
                return True
            node = self.producer.get(tensor)
            if node is None or node.op_type not in (Q, DQ):
                return False
            tensor = node.input[0]

    # One step

    def _is_noop(self, node: NodeProto) -> bool:
        """Return whether a node is Identity, or a Cast from a type to itself. ModelOpt's exporter adds such casts after Q/DQ."""
        if node.op_type == "Cast":
            kind = self.types.get(node.input[0])
            return kind is not None and kind == attribute(node, "to", 0)
        return node.op_type == "Identity"

    def source_of(self, tensor: str) -> str:
        """Return the tensor before any Identity nodes and casts to the same type."""
        return self._sources.get(tensor, tensor)

    def readers(self, tensor: str) -> list[tuple[NodeProto | None, str]]:
        """Return (node, name of the node's input) for each node that reads a tensor.

        If an Identity node or a cast to the same type reads the tensor, the nodes that read its output are returned instead. If the
        tensor is an output of the graph, the list also has an entry with None as the node.
        """
        found: list[tuple[NodeProto | None, str]] = []
        stack: list[tuple[NodeProto | None, str]] = [(None, tensor)]
        while stack:
            node, name = stack.pop()
            if node is not None and not self._is_noop(node):
                found.append((node, name))
                continue
            current = name if node is None else node.output[0]
            if current in self.outputs:
                found.append((None, current))
            stack += [(reader, current) for reader in reversed(self._readers.get(current, []))]
        return found

    def forwarded_inputs(self, node: NodeProto, through: Iterable[str] = FORWARDING_OPS) -> list[str]:
        """Return the inputs whose values a node forwards unchanged. If the node computes new values, the list is empty."""
        if node.op_type not in through or node.op_type not in FORWARDING_OPS:
            return []
        if node.op_type in ("Resize", "Upsample") and attribute(node, "mode", b"nearest") != b"nearest":
            return []
        inputs = node.input if node.op_type == "Concat" else node.input[:1]
        return [name for name in inputs if not self.is_constant(name) or self.params_of(name)]

    # Quantisation

    def params(self, node: NodeProto) -> QuantParams:
        """Return the quantisation parameters of a Q or DQ node."""
        scale = self.value(node.input[1])
        has_zero = len(node.input) > 2 and bool(node.input[2])
        zero = self.value(node.input[2]) if has_zero else np.zeros(1, np.int8)
        quantized = node.input[0] if node.op_type == DQ else node.output[0]
        kind = self.types.get(self.source_of(node.input[2])) if has_zero else self.types.get(quantized)
        if not kind:  # UINT8 is the default of the ONNX standard
            kind = int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8
        scale_type = self.types.get(self.source_of(node.input[1]), TensorProto.FLOAT)
        return QuantParams(node, scale, zero, int(kind), int(attribute(node, "axis", 1)), scale_type)

    def params_of(self, tensor: str) -> QuantParams | None:
        """Return the parameters of the DQ node that computes a tensor, or None if no DQ node computes it."""
        node = self.producer.get(self.source_of(tensor))
        return self.params(node) if node is not None and node.op_type == DQ else None

    def quantizers(self, op: str = Q) -> Iterator[QuantParams]:
        """Yield the parameters of all Q nodes (or all DQ nodes) of activations. Weights and biases are left out."""
        for node in self.nodes:
            if node.op_type == op and not self.is_constant(node.input[0]):
                yield self.params(node)

    def origins(self, tensor: str, through: Iterable[str] = FORWARDING_OPS) -> list[str]:
        """Return the tensors whose values reach this tensor. Nodes that only forward values are followed backwards."""
        found: dict[str, None] = {}
        seen: set[str] = set()
        stack = [tensor]
        while stack:
            name = self.source_of(stack.pop())
            if name in seen:
                continue
            seen.add(name)
            node = self.producer.get(name)
            forwarded_inputs = self.forwarded_inputs(node, through) if node is not None else []
            stack += reversed(forwarded_inputs)
            if not forwarded_inputs:
                found[name] = None
        return list(found)

    def final_readers(
        self, tensor: str, through: Iterable[str] = FORWARDING_OPS, also: Iterable[str] = ()
    ) -> list[NodeProto | None]:
        """Return the nodes that use the values of a tensor. Nodes that only forward values are followed to their readers.

        Args:
            also: Further operators to follow.
        """
        found: list[NodeProto | None] = []
        seen: set[str] = set()
        stack = [tensor]
        while stack:
            for node, name in self.readers(stack.pop()):
                if node is not None and (name in self.forwarded_inputs(node, through) or node.op_type in also):
                    if node.output[0] not in seen:
                        seen.add(node.output[0])
                        stack += node.output
                elif node not in found:
                    found.append(node)
        return found

    def arrives_int8(self, tensor: str) -> bool:
        """Return whether all values of a tensor come from DQ nodes. A layer that reads such a tensor can run in INT8."""
        return all(self.params_of(name) is not None for name in self.origins(tensor))

    def is_int8(self, node: NodeProto) -> bool:
        """Return whether the input and the weight of the layer `node` are both INT8."""
        return self.params_of(node.input[1]) is not None and self.arrives_int8(node.input[0])

    def weight(self, node: NodeProto) -> str:
        """Return the name of a layer's stored weight, float or integer. If the weight is computed, return the name of that tensor."""
        name = self.source_of(node.input[1])
        while name in self.producer and self.producer[name].op_type in (Q, DQ):
            name = self.source_of(self.producer[name].input[0])
        return name

    def channels(self, node: NodeProto) -> tuple[int, int] | None:
        """Return (input, output) channels of a Conv or ConvTranspose. None: the shape of the weight is unknown."""
        shape = self.shapes.get(self.weight(node))
        if not shape or len(shape) < 3 or shape[0] is None or shape[1] is None:
            return None
        groups = int(attribute(node, "group", 1))
        if node.op_type == "ConvTranspose":
            return shape[0], shape[1] * groups
        return shape[1] * groups, shape[0]

    @cached_property
    def before_layers(self) -> set[str]:
        """Tensors that a layer with weights (except DFL) reads, directly or through other nodes.

        All other tensors belong to the end of the model: outputs of the head's last convolutions, DFL, decode.
        """
        found: set[str] = set()
        for node in reversed(self.nodes):
            if self._is_layer(node) or any(name in found for name in node.output):
                found.update(node.input)
        return found

    def _is_layer(self, node: NodeProto) -> bool:
        """Return whether a node has trained weights."""
        product = node.op_type == "MatMul" and self.is_constant(node.input[1])
        return (product or node.op_type in WEIGHTED) and not self.is_dfl(node)

    def is_dfl(self, node: NodeProto) -> bool:
        """Return whether a node is DFL: its input is a softmax over bins, and its weights are 0, 1, 2, ... or their INT8 values.

        One output channel is not sufficient: the class convolution of a model with one class also has one output channel.
        """
        bins_N = self.value(self.weight(node))
        if bins_N is None or bins_N.size < 2 or bins_N.size != max(bins_N.shape):
            return False
        bins_N = bins_N.ravel().astype(np.float64)
        step = (bins_N[-1] - bins_N[0]) / (len(bins_N) - 1)
        if not step > 0 or np.abs((bins_N - bins_N[0]) / step - np.arange(len(bins_N))).max() > ROUNDED_BIN:
            return False
        producer = self.producer.get(self.before_qdq(node.input[0]))
        while producer is not None and producer.op_type in FORWARDING_OPS:
            producer = self.producer.get(self.before_qdq(producer.input[0]))
        return producer is not None and producer.op_type == "Softmax"

    def upstream(self, tensor: str) -> set[str]:
        """Return every tensor from which a tensor is computed, directly or indirectly."""
        seen: set[str] = set()
        stack = [tensor]
        while stack:
            node = self.producer.get(stack.pop())
            for name in node.input if node is not None else ():
                if name not in seen:
                    seen.add(name)
                    stack.append(name)
        return seen

    def before_qdq(self, tensor: str) -> str:
        """Return the tensor before any Q, DQ and Cast nodes."""
        tensor = self.source_of(tensor)
        while tensor in self.producer and self.producer[tensor].op_type in (Q, DQ, "Cast"):
            tensor = self.source_of(self.producer[tensor].input[0])
        return tensor
