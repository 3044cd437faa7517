"""Read a single ONNX node: name, attributes, constant value, and parameters of Q and DQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from yolo_compress.errors import CorruptArtifact

Q, DQ = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class QuantParams:
    """Quantisation parameters of a Q or DQ node.

    Attributes:
        scale: scalar or one value per channel. None: the graph computes the scale.
        zero: zero point, shaped like the scale. Zeros: the node has none. None: the graph computes the zero point.
        type: element type of the quantised tensor (`onnx.TensorProto`).
        axis: axis of the channels, used only with more than one scale.
        scale_type: element type of the scale.
    """

    node: NodeProto
    scale: np.ndarray | None
    zero: np.ndarray | None
    type: int
    axis: int
    scale_type: int

    @property
    def key(self) -> tuple[object, ...]:
        """Key for comparisons: equal for nodes with equal parameters. A scale that is computed in the graph equals only itself."""
        if self.scale is None or self.zero is None:
            return (tuple(self.node.input[1:]), self.type)
        axis = self.axis if self.scale.size > 1 else 0
        zero = self.zero.ravel().tolist() if self.zero.any() else 0
        return (repr(self.scale.ravel().tolist()), repr(zero), self.type, axis)

    @property
    def text(self) -> str:
        """Scale and zero point as short text."""
        if self.scale is None or self.zero is None:
            return "computed scale"
        if self.scale.size != 1:
            return f"{self.scale.size} scales"
        zero = int(np.asarray(self.zero, np.int64).ravel()[0]) if self.zero.size else 0
        return f"{float(self.scale.ravel()[0]):.6g}" + (f" at zero point {zero}" if zero else "")


def name_of(node: NodeProto) -> str:
    """Return the name of a node, or its operator and outputs if it has no name."""
    return node.name or f"{node.op_type} -> {', '.join(node.output)}"


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the attribute `name` of a node, or `default` if the node does not have this attribute.

    Raises:
        CorruptArtifact: The attribute does not have the type of the default.
    """
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            if not isinstance(value, type(default)):
                raise CorruptArtifact(
                    f"{node.op_type} {node.name}: attribute {name} is {type(value).__name__}, "
                    f"expected {type(default).__name__}; export the file again"
                )
            return value
    return default


def constant_of(node: NodeProto) -> TensorProto:
    """Return the tensor of a Constant node. Its attribute may have any of the forms that ONNX allows."""
    item = node.attribute[0]
    if item.type == AttributeProto.TENSOR:
        return item.t
    if item.type == AttributeProto.SPARSE_TENSOR:
        return item.sparse_tensor.values
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(item)))
