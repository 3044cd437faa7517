"""TensorRT's calibration cache, for INT8 without Q/DQ nodes: TensorRT 8 and 10 (JetPack 5 and 6), and the DLA.

A text file: a head with the version of TensorRT and the calibrator, then a line a tensor with its scale, the bytes of a float32 in
hexadecimal. TensorRT reads it through `IInt8EntropyCalibrator2.read_calibration_cache`, `trtexec --int8 --calib=FILE` from the same
file; removed in 11. No TensorRT has read one of ours: the format is that of the files that TensorRT writes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import onnx

from yolo_compress.atomic import atomic_write
from yolo_compress.errors import RecipeError
from yolo_compress.quant.qdq import find_convs, readers_of, tensor_ranges
from yolo_compress.quant.state import QMAX, QuantState

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
