"""What NVIDIA's own compiler says, for the target that can be built on any x86 machine: TensorRT-RTX."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from yolo_compress.errors import CompressError, EnvironmentLacks
from yolo_compress.lint.graph import Graph
from yolo_compress.lint.node import name_of
from yolo_compress.lint.rtx import CONVOLUTION, POOL, Layer, compile_layers
from yolo_compress.lint.rule import WHOLE, Hits, Rule
from yolo_compress.lint.targets import TENSORRT, Target


@lru_cache(maxsize=1)
def _built(graph: Graph) -> tuple[Layer, ...] | str:
    """The layers, or why there are none."""
    try:
        return tuple(compile_layers(Path(graph.source)))
    except EnvironmentLacks:
        raise
    except CompressError as error:
        return str(error)


def refused(graph: Graph, target: Target) -> Hits:
    built = _built(graph) if target.compiled else ()
    if isinstance(built, str):
        yield WHOLE, built.partition(": ")[2]


def compiled_in_float(graph: Graph, target: Target) -> Hits:
    """Convolutions and pools that read codes in the graph and not in the engine."""
    built = _built(graph) if target.compiled else ()
    if isinstance(built, str):
        return
    kinds = {"Conv": CONVOLUTION, "MaxPool": POOL}
    for node in graph.nodes:
        kernels = [layer for layer in built if layer.kind == kinds.get(node.op_type) and name_of(node) in layer.onnx]
        types = {kind for layer in kernels for kind in layer.inputs}
        if kernels and graph.codes_of(node.input[0]) is not None and types != {"Int8"}:
            yield name_of(node), f"reads {', '.join(sorted(types))}"


COMPILED = (
    Rule(
        "rtx-refused",
        "error",
        "TensorRT-RTX does not build it; TensorRT has the same importer.",
        "See its words.",
        refused,
        TENSORRT,
    ),
    Rule(
        "rtx-float",
        "warning",
        "NVIDIA's compiler runs the layer in float although its input is INT8: the codes are converted back first.",
        "Compare the types and scales around the layer with those of its neighbours.",
        compiled_in_float,
        TENSORRT,
    ),
)
