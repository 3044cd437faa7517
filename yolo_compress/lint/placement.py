"""Rules on missing and misplaced Q/DQ nodes.

NVIDIA's recommendations: quantise all inputs of layers with weights and the residual input of skip connections, and be
conservative elsewhere. Without the residual inputs INT8 is slower than FP16 (ultralytics #26159, NVIDIA/TensorRT #3038).
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from yolo_compress.lint.graph import FORWARDING_OPS, WEIGHTED, Graph
from yolo_compress.lint.node import DQ, Q, name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import Target

POOLS = ("MaxPool", "Resize", "Upsample")


def _feeds_int8(graph: Graph, node: NodeProto) -> bool:
    """Return whether a Q reads the node's output, looking through adds and layers that forward values."""
    ends = graph.final_readers(node.output[0], also=("Add",))
    return any(end is not None and end.op_type == Q for end in ends)


def float_adds(graph: Graph, target: Target) -> Hits:
    """Find sums that an INT8 layer reads and whose residual input is float.

    A sum that has no residual input is found if all its inputs are float.
    """
    for node in graph.nodes:
        if node.op_type != "Add" or any(graph.is_constant(name) for name in node.input):
            continue
        if not _feeds_int8(graph, node):
            continue
        residual = _residual(graph, node)
        if residual and not graph.arrives_int8(residual):
            yield name_of(node), f"its residual input {residual} is float"
        elif not residual and not any(graph.arrives_int8(name) for name in node.input):
            yield name_of(node), "both inputs are float"


def _residual(graph: Graph, node: NodeProto) -> str | None:
    """Return the residual input of a sum: the input from which the other input is computed. None: neither input is residual."""
    for residual, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
        if graph.before_qdq(residual) in graph.upstream(other):
            return residual
    return None


def float_concats(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if node.op_type == "Concat" and _feeds_int8(graph, node):
            features = [name for name in node.input if not graph.is_constant(name)]
            floats = [name for name in features if not graph.arrives_int8(name)]
            if floats:
                yield name_of(node), f"{len(floats)} of {len(features)} inputs are float: {_shortened(floats)}"


def float_pools(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        before_int8 = node.op_type in POOLS and graph.forwarded_inputs(node) and _feeds_int8(graph, node)
        if before_int8 and not graph.arrives_int8(node.input[0]):
            yield name_of(node), f"its input {node.input[0]} is float"


def mixed_readers(graph: Graph, target: Target) -> Hits:
    """Find float tensors that one reader quantises and another reads in float."""
    for tensor in (*(item.name for item in graph.inputs), *graph.producer):
        if graph.source_of(tensor) != tensor or graph.params_of(tensor) is not None:
            continue
        readers = [node for node, _ in graph.readers(tensor)]
        others = [
            name_of(node) if node is not None else "output" for node in readers if node is None or node.op_type != Q
        ]
        if others and len(others) < len(readers):
            yield graph.label(tensor), f"{tensor}: read as INT8, and as float by {_shortened(others)}"


def one_sided_layers(graph: Graph, target: Target) -> Hits:
    for node in _weighted(graph):
        feature, weight = graph.arrives_int8(node.input[0]), graph.params_of(node.input[1]) is not None
        if feature != weight:
            quantised, in_float = ("input", "weight") if feature else ("weight", "input")
            yield name_of(node), f"the {quantised} is quantised, the {in_float} is not"


def int8_tails(graph: Graph, target: Target) -> Hits:
    """Find INT8 convolutions at the end of the model: no other layer with weights, except DFL, follows them."""
    for node in _weighted(graph):
        if node.op_type != "Gemm" and graph.is_int8(node) and node.output[0] not in graph.before_layers:
            yield name_of(node), "an output convolution computes in INT8"


def quantised_outputs(graph: Graph, target: Target) -> Hits:
    """Find outputs that concatenate several tensors and quantise them with one scale."""
    for output, trail, joint in joined_outputs(graph):
        if any(node.op_type in (Q, DQ) for node in trail):
            yield name_of(joint), f"output {output} is quantised with one scale after a concat"


def joined_outputs(graph: Graph) -> Iterator[tuple[str, list[NodeProto], NodeProto]]:
    """Yield (output, nodes after the last Concat, last Concat) for each output that concatenates tensors.

    The nodes after the Concat only forward, cast or quantise values.
    """
    for output in graph.outputs:
        trail: list[NodeProto] = []
        node = graph.producer.get(output)
        while node is not None and node.op_type in (FORWARDING_OPS - {"Concat"}) | {Q, DQ, "Cast", "Identity"}:
            trail.append(node)
            node = graph.producer.get(node.input[0])
        if node is not None and node.op_type == "Concat":
            yield output, trail, node


def _weighted(graph: Graph) -> list[NodeProto]:
    return [node for node in graph.nodes if node.op_type in WEIGHTED]


def _shortened(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


PLACEMENT = (
    Rule(
        "add-float",
        "warning",
        "The residual sum runs in float between INT8 layers, and the tensor is stored in both precisions.",
        "Put Q and DQ on the residual input, with the scale of the convolution that reads the same tensor.",
        float_adds,
    ),
    Rule(
        "concat-float",
        "warning",
        "The concat copies float tensors, four times the bytes of INT8, and its readers quantise them again.",
        "Put Q and DQ on every input of the concat, all with the scale of its reader.",
        float_concats,
    ),
    Rule(
        "pool-float",
        "warning",
        "The pool or upsampling moves float tensors between INT8 layers.",
        "Put Q and DQ on its input, with the scale of the layer that reads its output.",
        float_pools,
    ),
    Rule(
        "mixed-readers",
        "warning",
        "The tensor is written twice, as INT8 and as float. This is why naive INT8 engines are slower than FP16.",
        "Let every reader use the same Q and DQ.",
        mixed_readers,
    ),
    Rule(
        "one-sided",
        "warning",
        "The layer runs in float and the conversion costs extra time.",
        "Quantise both input and weight, or neither.",
        one_sided_layers,
    ),
    Rule(
        "head-int8",
        "warning",
        "Boxes and logits are rounded to INT8.",
        "Leave the head's output convolutions in float; they are a few per cent of the MACs.",
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
