"""Rules on shapes: channel counts that are inefficient, and dynamic dimensions."""

from __future__ import annotations

from onnx import NodeProto

from yolo_compress.lint.graph import Graph
from yolo_compress.lint.node import name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import TENSORRT, Target


def _prunable_channels(graph: Graph, node: NodeProto) -> dict[str, int]:
    """Return the channel counts ("in", "out") that pruning can change, without image channels and outputs of the head."""
    channels = graph.channels(node)
    if channels is None:
        return {}
    counts = {}
    if graph.before_qdq(node.input[0]) not in {item.name for item in graph.inputs}:
        counts["in"] = channels[0]
    if node.output[0] in graph.before_layers:
        counts["out"] = channels[1]
    return counts


def _not_multiples(graph: Graph, multiple: int, int8_only: bool) -> Hits:
    """Find convolutions with a channel count that is not a multiple of `multiple`.

    If `multiple` is above 8, convolutions that break the rule for half of `multiple` are left out. That rule reports them.
    """
    for node in graph.nodes:
        if node.op_type in ("Conv", "ConvTranspose") and (not int8_only or graph.is_int8(node)):
            counts = _prunable_channels(graph, node)
            coarser = multiple > 8 and any(count % (multiple // 2) for count in counts.values())
            odd = [f"{count} {side}" for side, count in counts.items() if count % multiple]
            if odd and not coarser:
                yield name_of(node), f"{' and '.join(odd)}, {'INT8' if graph.is_int8(node) else 'float'}"


def not_8(graph: Graph, target: Target) -> Hits:
    yield from _not_multiples(graph, 8, int8_only=False)


def not_16(graph: Graph, target: Target) -> Hits:
    yield from _not_multiples(graph, 16, int8_only=target.runtime == "tensorrt")


def not_32(graph: Graph, target: Target) -> Hits:
    yield from _not_multiples(graph, 32, int8_only=True)


def open_batches(graph: Graph, target: Target) -> Hits:
    for item in graph.inputs:
        shape = graph.shapes.get(item.name, ())
        if shape and shape[0] is None and None not in shape[1:]:
            yield item.name, f"input {_shape_text(shape)}"


def open_sizes(graph: Graph, target: Target) -> Hits:
    for item in graph.inputs:
        shape = graph.shapes.get(item.name)
        if shape is None or None in shape[1:]:
            yield item.name, f"input {_shape_text(shape)}"


def open_on_dla(graph: Graph, target: Target) -> Hits:
    if target.dla:
        yield from open_batches(graph, target)
        yield from open_sizes(graph, target)


def _shape_text(shape: tuple[int | None, ...] | None) -> str:
    return "of unknown rank" if shape is None else "x".join("?" if size is None else str(size) for size in shape)


SHAPES = (
    Rule(
        "channels-8",
        "warning",
        "Kernels for tensor cores and vector units pad the channels to a multiple of 8, or a slower kernel runs.",
        "Prune to multiples of 8 or more; here: prune.round_to.",
        not_8,
    ),
    Rule(
        "channels-16",
        "info",
        "AVX-512 computes 16 channels at a time, INT8 tensor cores 16 or 32. A layer of 24 channels costs as much as 32.",
        "Set prune.round_to=16.",
        not_16,
    ),
    Rule(
        "channels-32",
        "info",
        "TensorRT's fastest INT8 layout (NC/32HW32) pads to 32 channels.",
        "Set prune.round_to=32 if the mAP does not suffer.",
        not_32,
        TENSORRT,
    ),
    Rule(
        "dynamic-batch",
        "warning",
        'TensorRT refuses to build without a profile: "no optimization profile has been defined".',
        "Export a fixed batch, or give a profile (trtexec --minShapes --optShapes --maxShapes). `engine` here makes one.",
        open_batches,
        TENSORRT,
    ),
    Rule(
        "dynamic-size",
        "error",
        "`engine` here refuses a dynamic image size. trtexec needs a profile and tunes its kernels for one size only.",
        "Export with a fixed imgsz (Ultralytics: dynamic=False).",
        open_sizes,
        TENSORRT,
    ),
    Rule(
        "dla-dynamic",
        "error",
        "The DLA supports only fixed shapes.",
        "Export a fixed batch and imgsz.",
        open_on_dla,
        TENSORRT,
    ),
)
