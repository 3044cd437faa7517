"""What rules read off a single node: attributes, constants, and the codes of a Q or DQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from yolo_compress.errors import CorruptArtifact

Q, DQ = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Codes:
    """What a Q or DQ node does.

    Attributes:
        node: the node.
        scale: its scale, None where it is computed, not stored.
        zero: its zero point; zeros where it is left out, None where it is computed.
        type: element type of the codes (`onnx.TensorProto`).
        axis: of the channels, where there is more than one scale.
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
        """Equal for nodes whose codes mean the same; a computed scale equals itself only."""
        if self.scale is None or self.zero is None:
            return (tuple(self.node.input[1:]), self.type)
        axis = self.axis if self.scale.size > 1 else 0
        zero = self.zero.ravel().tolist() if self.zero.any() else 0
        return (repr(self.scale.ravel().tolist()), repr(zero), self.type, axis)

    @property
    def text(self) -> str:
        """Scale and zero point, short."""
        if self.scale is None or self.zero is None:
            return "computed scale"
        if self.scale.size != 1:
            return f"{self.scale.size} scales"
        zero = int(np.asarray(self.zero, np.int64).ravel()[0]) if self.zero.size else 0
        return f"{float(self.scale.ravel()[0]):.6g}" + (f" at zero point {zero}" if zero else "")


def name_of(node: NodeProto) -> str:
    """A node's name, or what it makes where it has none."""
    return node.name or f"{node.op_type} -> {', '.join(node.output)}"


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node.

    Raises:
        CorruptArtifact: It is of another type than the default.
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
    """The tensor of a Constant node, in whichever form it is written."""
    item = node.attribute[0]
    if item.type == AttributeProto.TENSOR:
        return item.t
    if item.type == AttributeProto.SPARSE_TENSOR:
        return item.sparse_tensor.values
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(item)))
