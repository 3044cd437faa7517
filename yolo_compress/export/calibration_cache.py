"""Write TensorRT's calibration cache, for INT8 without Q/DQ nodes on TensorRT 8 and 10 (JetPack 5 and 6) and on the DLA.

The cache is a text file. The first line has the version of TensorRT and the calibrator. Each other line has the name of a tensor and
its scale, written as the bytes of a float32 in hexadecimal. Weights have no line: TensorRT computes their ranges from the graph, per
output channel. The exported graph therefore contains the weights after rounding to INT8.

TensorRT reads the cache with `IInt8EntropyCalibrator2.read_calibration_cache`. The program trtexec reads it with `--int8
--calib=FILE`. TensorRT 11 cannot read it. The format follows files that TensorRT wrote. TensorRT has not yet read a cache from this
module.
"""

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
    activation_output,
    find_convs,
    insert_pairs,
    int8_weight,
    quantise_weight,
    readers_of,
    tensor_ranges,
)
from yolo_compress.files.atomic import atomic_write
from yolo_compress.quant.ranges import AMAX_FLOOR, QMAX, QuantState

IMPLICIT = "int8-implicit.onnx"
CACHE = "int8-implicit.cache"
DEFAULT_VERSION = "8502"  # TensorRT 8.5.2, JetPack 5.1


def write_cache(float_onnx: Path, out: Path, state: QuantState, version: str = DEFAULT_VERSION) -> int:
    """Write a TensorRT calibration cache with the scales of the tensors of a float ONNX graph.

    If a graph has no Q/DQ nodes, TensorRT runs a layer in INT8 only if all tensors of the layer have a scale. The cache therefore also
    contains the outputs of convolutions before the activation (`state.outputs`) and the outputs of sigmoids (0 to 1).

    Args:
        float_onnx: ONNX file from which the engine is built, with the weights that belong to `state`. It is only read.
        out: File to write.
        state: Ranges of the model, as for `qdq.insert_qdq`.
        version: TensorRT version for the first line, digits without dots.

    Returns:
        Number of scales in the cache.

    Raises:
        CorruptArtifact: Graph and state do not belong together.
        RecipeError: The format does not allow the name of a tensor.
    """
    graph = onnx.load(str(float_onnx), load_external_data=False).graph
    amax = tensor_ranges(graph, state)
    readers = readers_of(graph)
    for name, conv in find_convs(graph, state.outputs).items():
        output = conv.output[0]
        amax.setdefault(output, state.outputs[name])
        amax |= {node.output[0]: 1.0 for node in readers.get(output, ()) if node.op_type == "Sigmoid"}
    if odd := [name for name in amax if ":" in name or "\n" in name]:
        raise RecipeError(f"{float_onnx}: a calibration cache cannot hold the tensor name {odd[0]!r}; export again")
    lines = [f"TRT-{version}-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', value / QMAX).hex()}" for name, value in amax.items()]
    atomic_write(out, "\n".join(lines) + "\n")
    return len(amax)


def write_implicit(float_onnx: Path, out: Path, state: QuantState) -> None:
    """Write an ONNX file without Q/DQ nodes, with weights rounded to INT8, and its calibration cache `CACHE` in the same folder.

    Args:
        float_onnx: As for `write_cache`.
        out: ONNX file to write.
        state: As for `write_cache`.

    Raises:
        CorruptArtifact: Graph and state do not belong together.
        RecipeError: The format does not allow the name of a tensor.
    """
    model = onnx.load(str(float_onnx))
    stored = {item.name: item for item in model.graph.initializer}
    for name, conv in find_convs(model.graph, state.convs).items():
        weight = numpy_helper.to_array(stored[conv.input[1]])
        int8_values, scale_C = int8_weight(weight, state.weights[name], state.weight_qmax)
        rounded = int8_values.astype(np.float32) * scale_C.reshape(-1, 1, 1, 1)
        stored[conv.input[1]].CopyFrom(numpy_helper.from_array(rounded, conv.input[1]))
    onnx.save(model, str(out))
    write_cache(out, out.with_name(CACHE), state)


def read_cache(cache: Path) -> dict[str, float]:
    """Return tensor name -> scale for all tensors in a calibration cache.

    Raises:
        CorruptArtifact: The file is not a calibration cache.
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


def write_explicit(implicit: Path, out: Path) -> None:
    """Write an ONNX file with Q/DQ nodes that computes the same as TensorRT with a calibration cache. Other runtimes can run the file.

    A convolution runs in INT8 if its input and output have scales in the cache. The range of its weights is the largest absolute
    value per output channel. TensorRT fuses a convolution with its activation, so nothing is rounded between the two.

    Args:
        implicit: ONNX file written by `write_implicit`, with its cache in the same folder. It is only read.
        out: File to write.

    Raises:
        CorruptArtifact: Graph and cache do not belong together.
    """
    model = onnx.load(str(implicit))
    graph, scales = model.graph, read_cache(implicit.with_name(CACHE))
    tensors = {name for node in graph.node for name in node.output} | {item.name for item in graph.input}
    if unknown := set(scales) - tensors:
        raise CorruptArtifact(
            f"{implicit}: {CACHE} has a scale for {sorted(unknown)[0]}, but the graph has no tensor of that name; "
            "run export again"
        )
    stored, fused = {item.name: item for item in graph.initializer}, set[str]()
    for node in [node for node in graph.node if node.op_type == "Conv"]:
        end, within = activation_output(graph, node) if node.output[0] in scales else ("", set())
        fused |= within - {end}
        if node.input[0] in scales and node.output[0] in scales:
            weight = numpy_helper.to_array(stored[node.input[1]])
            amax_C = np.abs(weight).reshape(len(weight), -1).max(1).clip(AMAX_FLOOR)
            quantise_weight(graph, node.input[1].removesuffix(".weight"), node, amax_C, QMAX)
    insert_pairs(graph, {name: Pair(scale, TensorProto.INT8, 0) for name, scale in scales.items() if name not in fused})
    onnx.save(model, str(out))
