"""Read the input and output of an ONNX file, for the configuration of an inference server such as Triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from yolo_compress.errors import RecipeError
from yolo_compress.runtime.backends.onnx_metadata import needs_nms
from yolo_compress.runtime.detect.post import EVERY_BOX

IOU = 0.7  # as in `runtime.commands.detect`


@dataclass(frozen=True)
class Tensor:
    """An input or output of an ONNX file. In `shape`, -1 is a dynamic dimension."""

    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """An ONNX file with one input [B, C, H, W] and one output.

    Attributes:
        nms: Whether NMS is part of the graph.
        iou: IoU threshold for a decoder with NMS; `EVERY_BOX` if the boxes need no NMS.
    """

    path: Path
    input: Tensor
    output: Tensor
    nms: bool
    iou: float = IOU

    @property
    def batch(self) -> int:
        """Number of images in one inference. -1: the batch is dynamic."""
        return self.input.shape[0]


def read(path: Path) -> Network:
    """Return the names and shapes of the input and the output of an ONNX file.

    Raises:
        RecipeError: The graph does not have one input and one output.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    held = {tensor.name for tensor in graph.initializer}
    inputs = [_tensor(value) for value in graph.input if value.name not in held]
    outputs = [_tensor(value) for value in graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise RecipeError(f"{path.name}: {len(inputs)} inputs and {len(outputs)} outputs, expected one of each")
    nms = any("NonMaxSuppression" in node.op_type or "NMS" in node.op_type for node in graph.node)
    return Network(path, inputs[0], outputs[0], nms, IOU if needs_nms(path) else EVERY_BOX)


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in kind.shape.dim)
    return Tensor(value.name, onnx.TensorProto.DataType.Name(kind.elem_type), shape)


def require(path: Path, got: object, expected: object, what: str) -> None:
    """Raise an error if a value in a server's configuration differs from the value of the model.

    Args:
        path: File of the configuration.
        got: Value in the configuration.
        expected: Value of the model.
        what: Name of the value.

    Raises:
        RecipeError: The values differ.
    """
    if got != expected:
        raise RecipeError(f"{path}: {what} is {got!r}, the model has {expected!r}; make the bundle again")
