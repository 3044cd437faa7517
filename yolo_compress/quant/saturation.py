"""Measure whether a runtime adds products of 8-bit weights exactly on this processor.

x86 without VNNI adds two products of INT8 values in 16 bits and saturates without an error (`quant.ranges.WEIGHT_BITS`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.registry import RUNTIMES

CHANNELS, SIDE, ROWS = 64, 32, 5
QMAX = 127
MAX_ERROR = 0.02  # relative to the exact sum; saturation halves the sum


def saturates(runtime: str) -> bool:
    """Return whether the sums of a runtime saturate on this processor when weights have 8 bits.

    The function runs two convolutions with the largest INT8 values and compares the result with the exact sum.

    Args:
        runtime: Key of `BACKENDS`. The runtime must be installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file, engine = Path(scratch, "int8.onnx"), Path(scratch, "engine")
        zero_point = next((one.zero_point for one in RUNTIMES[runtime].int8 if one.zero_point is not None), 0)
        onnx.save(_largest_values_model(zero_point), str(file))
        BACKENDS[runtime].build(file, engine, "int8")
        with open_engine(engine) as backend:
            sums = backend(np.ones((1, 3, SIDE, SIDE), np.float32))
    return bool(np.abs(sums - 1).max() > MAX_ERROR)


def _largest_values_model(zero_point: int) -> onnx.ModelProto:
    """Return an ONNX model whose output for an input of ones is exactly one, computed with the largest INT8 values.

    Weights are INT8. Activations are UINT8 with zero point 128, or INT8 with zero point 0, as in the file for the runtime.
    """
    graph = helper.make_graph(
        [],
        "largest_codes",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, ROWS, SIDE * SIDE])],
    )

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def quantised(name: str) -> str:
        """Add a Q/DQ pair with the range 1, so that a value of 1 becomes the largest INT8 value. Return the name of its output."""
        pair = [
            constant(f"{name}_scale", np.array(1 / QMAX, np.float32)),
            constant(f"{name}_zero", np.array(zero_point, np.uint8 if zero_point else np.int8)),
        ]
        return add("DequantizeLinear", [add("QuantizeLinear", [name, *pair], f"{name}_Q"), *pair], f"{name}_DQ")

    def conv(read: str, name: str, in_channels: int, out: int) -> str:
        int8_values = constant(f"{name}_w", np.full((out, in_channels, 1, 1), QMAX, np.int8))
        scale = constant(f"{name}_w_scale", np.full(out, 1 / (QMAX * in_channels), np.float32))
        zero = constant(f"{name}_w_zero", np.zeros(out, np.int8))
        weight = add("DequantizeLinear", [int8_values, scale, zero], f"{name}_w_DQ", axis=0)
        bias = constant(f"{name}_bias", np.zeros(out, np.float32))
        return quantised(add("Conv", [read, weight, bias], name, kernel_shape=[1, 1]))

    last = conv(conv(quantised("images"), "first", 3, CHANNELS), "second", CHANNELS, ROWS)
    add("Reshape", [last, constant("shape", np.array([1, ROWS, SIDE * SIDE], np.int64))], "output0")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"names": str({0: "ones"}), "imgsz": str([SIDE, SIDE])})
    onnx.checker.check_model(model, full_check=True)
    return model
