"""Small ONNX graphs for the rules of lint, made tensor by tensor. Every method returns the name of its tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


class Net:
    def __init__(self, opset: int = 17, size: tuple[Any, ...] = (1, 3, 32, 32), type: int = TensorProto.FLOAT) -> None:
        self.opset, self.type = opset, type
        self.declared: list[int] | None = None  # shape of the outputs, if it cannot be inferred
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("images", type, size)]

    def constant(self, name: str, value: Any, dtype: Any = None, type: int | None = None) -> str:
        array = np.asarray(value, dtype)
        if type == TensorProto.BFLOAT16:
            item = helper.make_tensor(name, type, array.shape, array.astype(np.float32).ravel().tolist())
        else:
            item = numpy_helper.from_array(array, name)
        self.constants = [old for old in self.constants if old.name != name] + [item]
        return name

    def op(self, kind: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        made = [name if i == 0 else f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, made, name, **attributes))
        return made[0]

    def pair(self, tensor: str, scale: Any = 0.1, zero: Any = 0, dtype: Any = np.int8, name: str = "") -> str:
        """Add Q and DQ to a feature map: per tensor, or per channel if `scale` is a list."""
        name = name or f"{tensor}_"
        scale = np.asarray(scale, np.float32)
        self.constant(f"{name}scale", scale)
        self.constant(f"{name}zero", np.full(scale.shape, zero), dtype)
        self.op("QuantizeLinear", [tensor, f"{name}scale", f"{name}zero"], f"{name}Q")
        return self.op("DequantizeLinear", [f"{name}Q", f"{name}scale", f"{name}zero"], f"{name}DQ")

    def weight(self, name: str, shape: Sequence[int], scales: Any = None, axis: int = 0, code: int = 63) -> str:
        """Add stored INT8 codes and their DQ, with one scale for each output channel."""
        scales = np.full(shape[axis], 0.01, np.float32) if scales is None else np.asarray(scales, np.float32)
        codes = self.constant(f"{name}_codes", np.full(shape, code), np.int8)
        inputs = [
            codes,
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero", np.zeros(scales.shape), np.int8),
        ]
        return self.op("DequantizeLinear", inputs, f"{name}_DQ", **({"axis": axis} if scales.size > 1 else {}))

    def conv(self, tensor: str, name: str, into: int = 32, out: int = 32, weight: str = "", **attributes: Any) -> str:
        """Add a 1x1 convolution. Its weight is float unless `weight` names another."""
        if not weight:
            dtype = {TensorProto.FLOAT16: np.float16}.get(self.type, np.float32)
            weight = self.constant(f"{name}_w", np.full((out, into, 1, 1), 0.5), dtype, type=self.type)
        return self.op("Conv", [tensor, weight], name, **attributes)

    def int8_conv(self, tensor: str, name: str, into: int = 32, out: int = 32, **weight: Any) -> str:
        return self.conv(tensor, name, weight=self.weight(f"{name}_w", (out, into, 1, 1), **weight))

    def stem(self) -> str:
        """Add an INT8 convolution of the image. Return its float feature map of 32 channels."""
        return self.op("Relu", [self.int8_conv(self.pair("images"), "stem", into=3)], "feature")

    def head(self, tensor: str) -> Net:
        """Add a float output convolution of 5 channels."""
        self.outputs = [self.conv(tensor, "head", out=5)]
        return self

    def ends(self, *outputs: str) -> Net:
        self.outputs = list(outputs)
        return self

    def model(self) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info(name, self.type, self.declared) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, outputs, self.constants)
        domains = [helper.make_opsetid("", self.opset)]
        if any(node.domain for node in self.nodes):
            domains.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=domains, ir_version=10)

    def save(self, path: Path) -> Path:
        onnx.save(self.model(), str(path))
        return path
