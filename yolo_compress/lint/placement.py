"""Rules on where Q and DQ are, and are not.

NVIDIA's rules for Q/DQ placement: quantise all inputs of weighted layers, and the residual input of a skip connection; be
conservative elsewhere. A graph that does only the first is slower than FP16 (ultralytics #26159, NVIDIA/TensorRT #3038).
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from yolo_compress.lint.graph import CARRIES, WEIGHTED, Graph
from yolo_compress.lint.node import DQ, Q, name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import Target

POOLS = ("MaxPool", "Resize", "Upsample")


def _feeds_codes(graph: Graph, node: NodeProto) -> bool:
    """Whether a Q reads what comes out, past other adds and layers that pass values on: the node lies among INT8 layers."""
    ends = graph.ends(node.output[0], also=("Add",))
    return any(end is not None and end.op_type == Q for end in ends)


def float_adds(graph: Graph, target: Target) -> Hits:
    """Adds of two features, one of which (the residual one, where it can be told) is to arrive as codes."""
    for node in graph.nodes:
        if node.op_type != "Add" or any(graph.is_constant(name) for name in node.input):
            continue
        if not _feeds_codes(graph, node):
            continue
        residual = _residual(graph, node)
        if residual and not graph.arrives_int8(residual):
            yield name_of(node), f"its residual input {residual} is float"
        elif not residual and not any(graph.arrives_int8(name) for name in node.input):
            yield name_of(node), "both inputs are float"


def _residual(graph: Graph, node: NodeProto) -> str | None:
    """The input from which the other one is computed."""
    for residual, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        if graph.bare(residual) in graph.upstream(other):
            return residual
    return None


def float_concats(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if node.op_type == "Concat" and _feeds_codes(graph, node):
            features = [name for name in node.input if not graph.is_constant(name)]
            floats = [name for name in features if not graph.arrives_int8(name)]
            if floats:
                yield name_of(node), f"{len(floats)} of {len(features)} inputs are float: {_short(floats)}"


def float_pools(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        among = node.op_type in POOLS and graph.carried(node) and _feeds_codes(graph, node)
        if among and not graph.arrives_int8(node.input[0]):
            yield name_of(node), f"its input {node.input[0]} is float"


def mixed_readers(graph: Graph, target: Target) -> Hits:
    """Float tensors that one reader quantises and another reads as they are."""
    for tensor in (*(item.name for item in graph.inputs), *graph.maker):
        if graph.source_of(tensor) != tensor or graph.codes_of(tensor) is not None:
            continue
        readers = [node for node, _ in graph.readers(tensor)]
        others = [
            name_of(node) if node is not None else "output" for node in readers if node is None or node.op_type != Q
        ]
        if others and len(others) < len(readers):
            yield graph.label(tensor), f"{tensor}: read as codes, and as float by {_short(others)}"


def one_sided_layers(graph: Graph, target: Target) -> Hits:
    for node in _weighted(graph):
        feature, weight = graph.arrives_int8(node.input[0]), graph.codes_of(node.input[1]) is not None
        if feature != weight:
            there, lacks = ("input", "weight") if feature else ("weight", "input")
            yield name_of(node), f"the {there} is quantised, the {lacks} is not"


def int8_tails(graph: Graph, target: Target) -> Hits:
    """Convolutions that no layer with weights follows; DFL does not count as following."""
    for node in _weighted(graph):
        if node.op_type != "Gemm" and graph.is_int8(node) and node.output[0] not in graph.before_layers:
            yield name_of(node), "an output convolution computes in INT8"


def quantised_outputs(graph: Graph, target: Target) -> Hits:
    """Outputs that join several things and are codes as a whole."""
    for output, trail, joint in joined_outputs(graph):
        if any(node.op_type in (Q, DQ) for node in trail):
            yield name_of(joint), f"output {output} is quantised with one scale behind a concat"


def joined_outputs(graph: Graph) -> Iterator[tuple[str, list[NodeProto], NodeProto]]:
    """(output, nodes before it that only pass on, cast or quantise, the Concat before those)."""
    for output in graph.outputs:
        trail: list[NodeProto] = []
        node = graph.maker.get(output)
        while node is not None and node.op_type in (CARRIES - {"Concat"}) | {Q, DQ, "Cast", "Identity"}:
            trail.append(node)
            node = graph.maker.get(node.input[0])
        if node is not None and node.op_type == "Concat":
            yield output, trail, node


def _weighted(graph: Graph) -> list[NodeProto]:
    return [node for node in graph.nodes if node.op_type in WEIGHTED]


def _short(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


PLACEMENT = (
    Rule(
        "add-float",
        "warning",
        "The residual sum runs in float between INT8 layers, and the tensor is stored in both precisions.",
        "Q and DQ on the residual input, with the scale of the convolution that reads the same tensor.",
        float_adds,
    ),
    Rule(
        "concat-float",
        "warning",
        "The concat copies float tensors, four times the bytes, and its readers quantise them again.",
        "Q and DQ on every input of the concat, all with the scale of its reader.",
        float_concats,
    ),
    Rule(
        "pool-float",
        "warning",
        "The pool or upsampling moves float tensors between INT8 layers.",
        "Q and DQ on its input, with the scale of what reads its output.",
        float_pools,
    ),
    Rule(
        "mixed-readers",
        "warning",
        "The tensor is written twice, as INT8 and as float, which is why naive INT8 engines are slower than FP16.",
        "Let every reader read through the same Q and DQ.",
        mixed_readers,
    ),
    Rule(
        "one-sided",
        "warning",
        "The layer runs in float and pays for the conversion as well.",
        "Quantise input and weight, or neither.",
        one_sided_layers,
    ),
    Rule(
        "head-int8",
        "warning",
        "Boxes and logits leave with the resolution of one INT8 step.",
        "Leave the head's output convolutions in float; they are some per cent of the MACs.",
        int8_tails,
    ),
    Rule(
        "output-int8",
        "error",
        "Boxes (0 to 640) and scores (0 to 1) share one scale: every score is rounded to 0.",
        "Leave the output and the decode before it in float.",
        quantised_outputs,
    ),
)
