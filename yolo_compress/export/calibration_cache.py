"""TensorRT's calibration cache, for INT8 without Q/DQ nodes: TensorRT 8 and 10 (JetPack 5 and 6), and the DLA.

A text file: a head with the version of TensorRT and the calibrator, then a line a tensor with its scale, the bytes of a float32
in hexadecimal. Weights have no line: TensorRT takes their ranges from the graph, the largest absolute value of each output
channel; so the graph here holds the weights on their trained grid. TensorRT reads the cache through
`IInt8EntropyCalibrator2.read_calibration_cache`, `trtexec --int8 --calib=FILE` from the same file; removed in 11. No TensorRT
has read one of ours: the format is that of the files that TensorRT writes."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from yolo_compress.errors import CorruptArtifact, RecipeError
from yolo_compress.export.qdq import (
    Pair,
    activated,
    coded,
    find_convs,
    insert_pairs,
    quantise_weight,
    readers_of,
    tensor_ranges,
)
from yolo_compress.files.atomic import atomic_write
from yolo_compress.quant.ranges import AMAX_FLOOR, QMAX, QuantState

IMPLICIT = "int8-implicit.onnx"
CACHE = "int8-implicit.cache"
DEFAULT_VERSION = "8502"  # of JetPack 5.1


def write_cache(float_onnx: Path, out: Path, state: QuantState, version: str = DEFAULT_VERSION) -> int:
    """Write the scales of a float graph's tensors; returns how many.

    Beside the tensors of the plan, what convolutions give before their activation (`state.outputs`) and sigmoids (0 to 1):
    without Q/DQ nodes TensorRT takes a layer for INT8 only if all of its tensors have a scale.

    Args:
        float_onnx: The graph that the engine is to be built from, with the weights that `state` belongs to. Read only.
        out: File to write.
        state: As for `qdq.insert_qdq`.
        version: Of TensorRT, digits without dots, for the head.

    Raises:
        CorruptArtifact: Graph and state do not belong together.
        RecipeError: A tensor's name that the format cannot hold.
    """
    graph = onnx.load(str(float_onnx), load_external_data=False).graph
    amax = tensor_ranges(graph, state)
    readers = readers_of(graph)
    for name, conv in find_convs(graph, state.outputs).items():
        made = conv.output[0]
        amax.setdefault(made, state.outputs[name])
        amax |= {node.output[0]: 1.0 for node in readers.get(made, ()) if node.op_type == "Sigmoid"}
    if odd := [name for name in amax if ":" in name or "\n" in name]:
        raise RecipeError(f"{float_onnx}: a calibration cache cannot hold the tensor name {odd[0]!r}; export again")
    lines = [f"TRT-{version}-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', value / QMAX).hex()}" for name, value in amax.items()]
    atomic_write(out, "\n".join(lines) + "\n")
    return len(amax)


def write_implicit(float_onnx: Path, out: Path, state: QuantState) -> None:
    """Write the graph without Q/DQ nodes, its weights rounded to the codes of `state`, and `CACHE` beside it.

    Args:
        float_onnx: As for `write_cache`.
        out: The graph to write.
        state: As for `write_cache`.

    Raises:
        CorruptArtifact, RecipeError: As `write_cache`.
    """
    model = onnx.load(str(float_onnx))
    stored = {item.name: item for item in model.graph.initializer}
    for name, conv in find_convs(model.graph, state.convs).items():
        weight = numpy_helper.to_array(stored[conv.input[1]])
        codes, scale_C = coded(weight, state.weights[name], state.weight_qmax)
        rounded = codes.astype(np.float32) * scale_C.reshape(-1, 1, 1, 1)
        stored[conv.input[1]].CopyFrom(numpy_helper.from_array(rounded, conv.input[1]))
    onnx.save(model, str(out))
    write_cache(out, out.with_name(CACHE), state)


def read_cache(cache: Path) -> dict[str, float]:
    """Scale of each tensor of a calibration cache.

    Raises:
        CorruptArtifact: It is none.
    """
    try:
        lines = cache.read_text(encoding="utf-8").splitlines()
        if not lines[0].startswith("TRT-"):
            raise ValueError(lines[0])
        pairs = (line.rpartition(": ") for line in lines[1:])
        scales = {name: float(struct.unpack(">f", bytes.fromhex(code))[0]) for name, _, code in pairs}
        if odd := [name for name, scale in scales.items() if not 0 < scale < math.inf]:
            raise ValueError(f"scale of {odd[0]} is {scales[odd[0]]}, expected a finite number above 0")
        return scales
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise CorruptArtifact(f"{cache}: not a calibration cache ({error}); run export again") from error


def explicit(implicit: Path, out: Path) -> None:
    """Write what TensorRT makes of a graph and the cache beside it, with Q/DQ nodes, so that other runtimes can run it.

    A convolution computes in INT8 if what it reads and what it gives have scales; its weights are quantised by the largest absolute
    value of each output channel. TensorRT fuses a convolution with its activation, so nothing is rounded between the two.

    Args:
        implicit: What `write_implicit` wrote. Read only.
        out: File to write.

    Raises:
        CorruptArtifact: Graph and cache do not belong together.
    """
    model = onnx.load(str(implicit))
    graph, read = model.graph, read_cache(implicit.with_name(CACHE))
    made = {name for node in graph.node for name in node.output} | {item.name for item in graph.input}
    if strangers := set(read) - made:
        raise CorruptArtifact(
            f"{implicit}: no tensor {sorted(strangers)[0]}, of which {CACHE} has a scale; run export again"
        )
    stored, fused = {item.name: item for item in graph.initializer}, set[str]()
    for node in [node for node in graph.node if node.op_type == "Conv"]:
        end, within = activated(graph, node) if node.output[0] in read else ("", set())
        fused |= within - {end}
        if node.input[0] in read and node.output[0] in read:
            weight = numpy_helper.to_array(stored[node.input[1]])
            amax_C = np.abs(weight).reshape(len(weight), -1).max(1).clip(AMAX_FLOOR)
            quantise_weight(graph, node.input[1].removesuffix(".weight"), node, amax_C, QMAX)
    insert_pairs(
        graph, {name: Pair(scale * QMAX, TensorProto.INT8, 0) for name, scale in read.items() if name not in fused}
    )
    onnx.save(model, str(out))
