"""Read an ONNX file as plain data, for converters that write each layer themselves: fixed shapes, constants as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..errors import EngineError, NotConverted, RuntimeUnavailable

Shape = Tuple[int, ...]
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FLOATS = (1, 10)  # element types of ONNX: float32 and float16
Fault = Tuple[str, str]  # name of a node, and what a converter does not write there
Constants = Dict[str, np.ndarray]
Attributes = Dict[str, Any]  # name -> number, text, list or array, as ONNX defines it for the kind of node


# Attributes of the one kind of Resize that moves no value between pixels. ONNX's defaults are others.
RESIZE = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}


class Node(NamedTuple):
    """A node of an ONNX graph. An input that is left out is "". Text in attributes is `str`."""

    kind: str
    name: str
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    attributes: Attributes

    @property
    def label(self) -> str:
        """The name, or the first output of a node without a name."""
        return self.name or self.outputs[0]


class Weight(NamedTuple):
    """INT8 weights of a convolution: the INT8 values, and the scale of each output channel."""

    values: np.ndarray
    scale_O: np.ndarray


class Graph(NamedTuple):
    """An ONNX graph with a fixed batch.

    Attributes:
        nodes: nodes in the order of the graph, without those that compute constants.
        constants: arrays by the name of their tensor.
        shapes: shapes of all other tensors by their name.
        input, output: names of the images and of the output.
    """

    nodes: List[Node]
    constants: Dict[str, np.ndarray]
    shapes: Dict[str, Shape]
    input: str
    output: str


def require(install: str) -> Any:
    """Import and return the onnx package.

    Args:
        install: the command that installs what the converter needs.

    Raises:
        RuntimeUnavailable: the package is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise RuntimeUnavailable(f"onnx does not import ({error})", install) from error
    return onnx


def read(file: Path, imgsz: Sequence[int], install: str) -> Graph:
    """Read an ONNX file that `export` wrote. See `of`.

    Args:
        imgsz: height and width of the input, px.
        install: the command that installs what the converter needs.

    Raises:
        RuntimeUnavailable: onnx is missing.
        EngineError: the file takes images of another size, or `of` refuses it.
    """
    model = require(install).load(str(file))
    takes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]]
    if takes != list(imgsz):
        raise EngineError(f"{file}: takes {takes} px, its metadata says {tuple(imgsz)}; export again")
    return of(model, file)


def of(model: Any, file: Path) -> Graph:
    """Return an ONNX model as a graph. An open batch becomes 1. The model is changed.

    Nodes whose inputs are constants are computed, except for the dequantised weights.

    Args:
        model: `onnx.ModelProto`.
        file: its file, for error messages.

    Raises:
        EngineError: the model has several inputs or outputs, or NMS in its graph. Or a shape in it is not fixed, or onnx cannot
            compute its constants.
    """
    import onnx

    graph = model.graph
    stored = {one.name for one in graph.initializer}
    inputs = [one for one in graph.input if one.name not in stored]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise EngineError(
            f"{file}: {len(inputs)} inputs and {len(graph.output)} outputs, expected one of each: images, and output0"
        )
    if any(node.op_type == "NonMaxSuppression" for node in graph.node):
        raise EngineError(f"{file}: has NMS in its graph; give the file without NMS")
    if not all(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim[1:]):
        raise EngineError(f"{file}: the size of its images is open; export it with one size")
    for ends in (inputs, graph.output):
        for first in ends[0].type.tensor_type.shape.dim[:1]:
            first.dim_value = first.dim_value or 1  # a value replaces a name
    del graph.value_info[:]
    try:
        constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
        shapes = _shapes(onnx, model)
        while _fold(onnx, model, constants, shapes):
            shapes = _shapes(onnx, model)  # a folded constant can be the shape of another tensor
    except MemoryError:
        raise
    except Exception as error:  # onnx's evaluator raises whatever its operators do
        raise EngineError(f"{file}: onnx cannot compute its constants ({error}); export it again") from error
    nodes = []
    for node in graph.node:
        attributes = {one.name: _plain(onnx.helper.get_attribute_value(one)) for one in node.attribute}
        nodes.append(Node(node.op_type, node.name, tuple(node.input), tuple(node.output), attributes))
    open_shapes = [name for node in nodes for name in node.outputs if name and not all(shapes.get(name, (0,)))]
    if open_shapes:
        raise EngineError(f"{file}: the shape of {open_shapes[0]} is not fixed; export again with export.simplify=true")
    return Graph(nodes, constants, shapes, inputs[0].name, graph.output[0].name)


def unknown(graph: Graph, kinds: Container[str]) -> Iterator[Fault]:
    """Yield the nodes that a converter does not write: of another type, or with attributes that `export` does not write.

    Args:
        kinds: types of nodes that it writes.
    """
    for node in graph.nodes:
        if node.kind not in kinds:
            yield node.label, f"is a {node.kind}"
        elif node.kind in ODD and ODD[node.kind](node, graph.constants):
            yield node.label, f"is a {node.kind} of another kind"


def refuse(faults: Iterable[Fault], file: Path, title: str) -> None:
    """Raise NotConverted with the first fault that a converter found. `title` is the name of its format."""
    for name, fault in faults:
        raise NotConverted(
            f"{file}: {name} {fault}, which this package does not convert to {title}; leave this runtime out"
        )


def _is_odd_slice(node: Node, constants: Constants) -> bool:
    """Return whether the bounds of a Slice are not stored, or it leaves places out."""
    stored = len(node.inputs) > 3 and all(name in constants for name in node.inputs[1:])
    return not stored or (len(node.inputs) > 4 and bool((constants[node.inputs[4]] != 1).any()))


def _padded_by_itself(node: Node) -> bool:
    return node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")


# Type of a node -> whether it is not one that `export` writes.
ODD: Dict[str, Callable[[Node, Constants], bool]] = {
    "Cast": lambda node, constants: node.attributes.get("to") not in FLOATS,
    "Conv": lambda node, constants: len(node.attributes.get("kernel_shape", [1, 1])) != 2 or _padded_by_itself(node),
    "Gather": lambda node, constants: np.size(constants.get(node.inputs[1], ())) != 1,
    "MaxPool": lambda node, constants: bool(
        node.attributes.get("ceil_mode") or set(node.attributes.get("dilations", [1])) != {1} or _padded_by_itself(node)
    ),
    "ReduceMax": lambda node, constants: len(node.inputs) > 1 and node.inputs[1] not in constants,
    "Resize": lambda node, constants: tuple(node.attributes.get(key) for key in RESIZE) != tuple(RESIZE.values()),
    "Slice": _is_odd_slice,
    "Split": lambda node, constants: "axis" not in node.attributes,
    "Transpose": lambda node, constants: "perm" not in node.attributes,
}


def slice_bounds(inputs: Sequence[Any], shape: Shape) -> Dict[int, Tuple[int, int]]:
    """Return axis -> (begin, end) of a Slice node, from its inputs and the shape of the first one."""
    begins, ends, axes = (np.atleast_1d(value).tolist() for value in inputs[1:4])
    return {
        axis % len(shape): slice(begin, end).indices(shape[axis])[:2] for begin, end, axis in zip(begins, ends, axes)
    }


def _shapes(onnx: Any, model: Any) -> Dict[str, Shape]:
    """Return the shapes of all tensors that are not stored. A size that is not known is 0."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        one.name: tuple(dim.dim_value for dim in one.type.tensor_type.shape.dim)
        for part in (graph.input, graph.value_info, graph.output)
        for one in part
    }


def _fold(onnx: Any, model: Any, constants: Dict[str, np.ndarray], shapes: Dict[str, Shape]) -> bool:
    """Compute the nodes whose inputs are constants, and remove them from the graph. Return whether there were any."""
    kept: List[Any] = []
    found: Dict[str, np.ndarray] = {}
    for node in model.graph.node:
        known = {**constants, **found}
        if node.op_type == "Shape" and all(shapes.get(node.input[0], (0,))):
            found[node.output[0]] = np.array(shapes[node.input[0]], np.int64)
        elif node.op_type != DEQUANTIZE and all(name in known for name in node.input if name):
            found.update(zip(node.output, _computed(onnx, node, model, known)))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in found.items())
    constants.update(found)
    return bool(found)


def _computed(onnx: Any, node: Any, model: Any, constants: Dict[str, np.ndarray]) -> List[np.ndarray]:
    """Return the outputs of a node whose inputs are constants."""
    from onnx.reference import ReferenceEvaluator

    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    ends = [[onnx.helper.make_empty_tensor_value_info(name) for name in names] for names in (node.input, node.output)]
    graph = onnx.helper.make_graph([node], "node", *ends)
    alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [
        np.asarray(value)
        for value in ReferenceEvaluator(alone).run(None, {name: constants[name] for name in node.input})
    ]


def _plain(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value
