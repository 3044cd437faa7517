"""Rules on scales that meet: codes pass a concat, add, pool or upsampling unchanged only if they mean the same on both sides.

NVIDIA's yolov7_qat: the same network at the same mAP ran at 180 frames a second before its scales were shared around concats
and pools, and at 207 after.
"""

from __future__ import annotations

from onnx import NodeProto

from yolo_compress.lint.graph import CARRIES, Graph
from yolo_compress.lint.node import Codes, Q, name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import TENSORRT, Target

PASSES = CARRIES - {"Concat"}


def _arriving(graph: Graph, tensor: str, passes: frozenset[str] = CARRIES) -> list[Codes]:
    found = (graph.codes_of(name) for name in graph.origins(tensor, passes))
    return [codes for codes in found if codes is not None]


def _leaving(graph: Graph, tensor: str) -> list[Codes]:
    return [graph.codes(node) for node in graph.ends(tensor) if node is not None and node.op_type == Q]


def _unequal(*groups: list[Codes]) -> bool:
    return len({codes.key for group in groups for codes in group}) > 1


def _texts(group: list[Codes]) -> str:
    return ", ".join(dict.fromkeys(codes.text for codes in group)) or "float"


def at_concats(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if node.op_type == "Concat":
            into = [codes for name in node.input for codes in _arriving(graph, name)]
            out = _leaving(graph, node.output[0])
            if into and _unequal(into, out):
                yield name_of(node), f"in {_texts(into)}; out {_texts(out)}"


def at_adds(graph: Graph, target: Target) -> Hits:
    for node in graph.nodes:
        if node.op_type == "Add":
            sides = [_arriving(graph, name) for name in node.input]
            if all(sides) and _unequal(*sides):
                yield name_of(node), " against ".join(_texts(side) for side in sides)


def through_passes(graph: Graph, target: Target) -> Hits:
    for codes in graph.quantizers():
        into = _arriving(graph, codes.node.input[0], PASSES)
        if into and _unequal(into, [codes]):
            maker: NodeProto = graph.maker[graph.source_of(codes.node.input[0])]
            yield name_of(maker), f"in {_texts(into)}; out {codes.text}"


def of_one_tensor(graph: Graph, target: Target) -> Hits:
    for tensor in (*(item.name for item in graph.inputs), *graph.maker):
        if graph.source_of(tensor) == tensor and graph.codes_of(tensor) is None:
            readers = [node for node, _ in graph.readers(tensor) if node is not None and node.op_type == Q]
            pairs = [graph.codes(node) for node in readers]
            if _unequal(pairs):
                yield graph.label(tensor), f"quantised {len(pairs)} times, with {_texts(pairs)}"


SCALES = (
    Rule(
        "scales-concat",
        "warning",
        "Q and DQ do not cancel around the concat: each input is requantised by a kernel of its own.",
        "One scale for all that meets in the concat, its output included.",
        at_concats,
        TENSORRT,
    ),
    Rule(
        "scales-add",
        "warning",
        "The sum cannot be taken in INT8: one side is rescaled first.",
        "One scale for both sides; that of the residual input, which the block's first convolution reads.",
        at_adds,
        TENSORRT,
    ),
    Rule(
        "scales-pass",
        "warning",
        "The codes are rounded a second time behind a layer that only moves values: a kernel and accuracy for nothing.",
        "One scale before and behind it.",
        through_passes,
    ),
    Rule(
        "scales-tensor",
        "warning",
        "The tensor is quantised and stored once for each scale.",
        "One scale a tensor: let all readers share it.",
        of_one_tensor,
    ),
)
