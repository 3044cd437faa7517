"""Rules on shapes: channel counts that kernels want, and dimensions that are open."""

from __future__ import annotations

from onnx import NodeProto

from yolo_compress.lint.graph import Graph
from yolo_compress.lint.node import name_of
from yolo_compress.lint.rule import Hits, Rule
from yolo_compress.lint.targets import TENSORRT, Target


def _counts(graph: Graph, node: NodeProto) -> dict[str, int]:
    """Channel counts that somebody chose: not those of the image, nor of the head's outputs (classes)."""
    channels = graph.channels(node)
    if channels is None:
        return {}
    counts = {}
    if graph.bare(node.input[0]) not in {item.name for item in graph.inputs}:
        counts["in"] = channels[0]
    if node.output[0] in graph.before_layers:
        counts["out"] = channels[1]
    return counts


def _not_multiples(graph: Graph, multiple: int, int8_only: bool) -> Hits:
    """Convolutions with a count that is a multiple of the half of `multiple` (or anything, at 8), but not of `multiple`."""
    for node in graph.nodes:
        if node.op_type in ("Conv", "ConvTranspose") and (not int8_only or graph.is_int8(node)):
            counts = _counts(graph, node)
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
            yield item.name, f"input {_shown(shape)}"


def open_sizes(graph: Graph, target: Target) -> Hits:
    for item in graph.inputs:
        shape = graph.shapes.get(item.name)
        if shape is None or None in shape[1:]:
            yield item.name, f"input {_shown(shape)}"


def open_on_dla(graph: Graph, target: Target) -> Hits:
    if target.dla:
        yield from open_batches(graph, target)
        yield from open_sizes(graph, target)


def _shown(shape: tuple[int | None, ...] | None) -> str:
    return "of unknown rank" if shape is None else "x".join("?" if size is None else str(size) for size in shape)


SHAPES = (
    Rule(
        "channels-8",
        "warning",
        "Channels are padded to the next multiple of 8 by kernels for tensor cores and vector units, or a slow kernel is taken.",
        "Prune to multiples of 8 at least; here: prune.round_to.",
        not_8,
    ),
    Rule(
        "channels-16",
        "info",
        "AVX-512 computes 16 channels at a time, INT8 tensor cores 16 or 32: a layer of 24 costs what one of 32 costs.",
        "prune.round_to=16.",
        not_16,
    ),
    Rule(
        "channels-32",
        "info",
        "TensorRT's fastest INT8 layout (NC/32HW32) pads to 32 channels.",
        "prune.round_to=32, if its mAP is as good.",
        not_32,
        TENSORRT,
    ),
    Rule(
        "dynamic-batch",
        "warning",
        'Without a profile TensorRT builds nothing: "no optimization profile has been defined".',
        "Export a fixed batch; or give a profile (trtexec --minShapes --optShapes --maxShapes; `engine` here makes one).",
        open_batches,
        TENSORRT,
    ),
    Rule(
        "dynamic-size",
        "error",
        "`engine` here refuses an open image size, trtexec needs a profile, and kernels are tuned for one size of it.",
        "Export with a fixed imgsz (Ultralytics: dynamic=False).",
        open_sizes,
        TENSORRT,
    ),
    Rule(
        "dla-dynamic",
        "error",
        "The DLA takes fixed shapes only.",
        "Export a fixed batch and imgsz.",
        open_on_dla,
        TENSORRT,
    ),
)
