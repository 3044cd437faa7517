"""Rules that build an engine from the ONNX file and check its kernels.

The engine is built with TensorRT for RTX, an NVIDIA compiler that runs on any x86 machine, even without a GPU.
"""

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
def _compiled_layers(graph: Graph) -> tuple[Layer, ...] | str:
    """Return the layers of the engine, or the error message if the build failed."""
    try:
        return tuple(compile_layers(Path(graph.source)))
    except EnvironmentLacks:
        raise
    except CompressError as error:
        return str(error)


def refused(graph: Graph, target: Target) -> Hits:
    built = _compiled_layers(graph) if target.compiled else ()
    if isinstance(built, str):
        yield WHOLE, built.partition(": ")[2]


def float_kernels(graph: Graph, target: Target) -> Hits:
    """Find convolutions and pools that read INT8 in the ONNX graph but float in the engine."""
    built = _compiled_layers(graph) if target.compiled else ()
    if isinstance(built, str):
        return
    kinds = {"Conv": CONVOLUTION, "MaxPool": POOL}
    for node in graph.nodes:
        kernels = [layer for layer in built if layer.kind == kinds.get(node.op_type) and name_of(node) in layer.onnx]
        types = {kind for layer in kernels for kind in layer.inputs}
        if kernels and graph.params_of(node.input[0]) is not None and types != {"Int8"}:
            yield name_of(node), f"reads {', '.join(sorted(types))}"


COMPILED = (
    Rule(
        "rtx-refused",
        "error",
        "TensorRT-RTX cannot build the file. TensorRT uses the same ONNX importer.",
        "See the compiler's message.",
        refused,
        TENSORRT,
    ),
    Rule(
        "rtx-float",
        "warning",
        "NVIDIA's compiler converts the INT8 input back to float and runs the layer in float.",
        "Compare the types and scales around the layer with those of its neighbours.",
        float_kernels,
        TENSORRT,
    ),
)
