"""Write and read LiteRT files (`.tflite`): tensors, operators and buffers of one graph, with the classes of LiteRT's own schema."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import EngineError, RuntimeUnavailable

INSTALL = "pip install ai-edge-litert onnx"
FLOAT32, FLOAT16, INT8, INT32 = "FLOAT32", "FLOAT16", "INT8", "INT32"  # types of tensors
NUMPY = {FLOAT32: np.float32, FLOAT16: np.float16, INT8: np.int8, INT32: np.int32}
IDENTIFIER = b"TFL3"
SCHEMA = 3  # version of the file format
# Version of an operator that a LiteRT of 2020 or later needs for INT8. All others are version 1.
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "DEQUANTIZE": 3}
INT8_VERSIONS = {
    "ADD": 2, "CONCATENATION": 2, "LOGISTIC": 2, "MAX_POOL_2D": 2, "MUL": 2, "PAD": 2, "RELU": 2, "RESIZE_NEAREST_NEIGHBOR": 2,
    "SLICE": 2, "TRANSPOSE": 2,
}  # fmt: skip


class Quantised(NamedTuple):
    """How INT8 values stand for numbers: scale x (value - zero point).

    Attributes:
        scale: one scale, or one for each channel of `axis`.
        zero_point: INT8 value that stands for 0.
        axis: axis of the channels.
    """

    scale: np.ndarray
    zero_point: int = 0
    axis: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantised) and self[1:] == other[1:] and np.array_equal(self.scale, other.scale)

    def __hash__(self) -> int:
        return hash((self.scale.tobytes(), *self[1:]))


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: name in the file.
        kind: type, such as `INT8`.
        shape: sizes.
        quantised: scale and zero point; None: it has none.
        values: stored values; None: the tensor is computed.
    """

    name: str
    kind: str
    shape: Tuple[int, ...]
    quantised: Optional[Quantised]
    values: Optional[np.ndarray]


class Operator(NamedTuple):
    """An operator of a file: its type (`CONV_2D`), and its input and output tensors."""

    kind: str
    inputs: Tuple[Tensor, ...]
    outputs: Tuple[Tensor, ...]


def schema() -> Any:
    """Import and return LiteRT's schema.

    Raises:
        RuntimeUnavailable: LiteRT is missing.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise RuntimeUnavailable(f"ai-edge-litert does not import ({error})", INSTALL) from error
    return schema_py_generated


class Writer:
    """A graph that is written operator by operator."""

    def __init__(self) -> None:
        self._schema = schema()
        self._graph = self._schema.SubGraphT(tensors=[], operators=[], inputs=[], outputs=[], name="main")
        self._buffers = [self._schema.BufferT()]  # the first one is empty, for tensors that are computed
        self._codes: Dict[Tuple[str, int], int] = {}

    def tensor(
        self,
        name: str,
        kind: str,
        shape: Sequence[int],
        quantised: Optional[Quantised] = None,
        data: Optional[bytes] = None,
    ) -> int:
        """Add a tensor and return its index. `data` are the bytes of a constant; None: the tensor is computed."""
        buffer = 0
        if data is not None:
            buffer = len(self._buffers)
            self._buffers.append(self._schema.BufferT(data=np.frombuffer(data, np.uint8)))
        parameters = None
        if quantised is not None:
            scale = np.atleast_1d(quantised.scale).astype(np.float32)
            parameters = self._schema.QuantizationParametersT(
                scale=scale,
                zeroPoint=np.full(len(scale), quantised.zero_point, np.int64),
                quantizedDimension=quantised.axis,
            )
        code = getattr(self._schema.TensorType, kind)
        sizes = np.array(shape, np.int32)
        self._graph.tensors.append(self._schema.TensorT(sizes, code, buffer, name, parameters, hasRank=True))
        return len(self._graph.tensors) - 1

    def constant(self, name: str, values: np.ndarray, quantised: Optional[Quantised] = None) -> int:
        """Add a constant of type float32, float16, INT8 or INT32 and return its index."""
        kind = next(kind for kind, dtype in NUMPY.items() if values.dtype == dtype)
        return self.tensor(name, kind, values.shape, quantised, np.ascontiguousarray(values).tobytes())

    def add(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        """Add an operator. `options` are the attributes of its options in the schema, such as `axis` of a concatenation."""
        table = OPTIONS.get(kind)
        made = None if table is None else getattr(self._schema, table + "T")()
        for name, value in options.items():
            if not hasattr(made, name):
                raise AttributeError(f"{kind} has no option {name}")
            setattr(made, name, value)
        int8 = any(self._graph.tensors[one].type == self._schema.TensorType.INT8 for one in inputs)
        version = VERSIONS.get(kind, INT8_VERSIONS.get(kind, 1) if int8 else 1)
        code = self._codes.setdefault((kind, version), len(self._codes))
        self._graph.operators.append(
            self._schema.OperatorT(
                code,
                np.array(inputs, np.int32),
                np.array(outputs, np.int32),
                0 if table is None else getattr(self._schema.BuiltinOptions, table),
                made,
            )
        )

    def write(self, out: Path, inputs: Sequence[int], outputs: Sequence[int], description: str) -> None:
        """Write the file."""
        import flatbuffers

        self._graph.inputs, self._graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        codes = []
        for kind, version in self._codes:
            code = getattr(self._schema.BuiltinOperator, kind)
            codes.append(self._schema.OperatorCodeT(min(code, 127), version=version, builtinCode=code))
        model = self._schema.ModelT(SCHEMA, codes, [self._graph], description, self._buffers)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        out.write_bytes(bytes(builder.Output()))


# Type of an operator -> table of its options in the schema. LOGISTIC and RELU have none.
OPTIONS = {
    "ADD": "AddOptions", "BATCH_MATMUL": "BatchMatMulOptions", "CONCATENATION": "ConcatenationOptions", "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions", "DEQUANTIZE": "DequantizeOptions", "DIV": "DivOptions", "EXP": "ExpOptions",
    "LEAKY_RELU": "LeakyReluOptions", "MAX_POOL_2D": "Pool2DOptions", "MUL": "MulOptions", "PAD": "PadOptions",
    "QUANTIZE": "QuantizeOptions", "REDUCE_MAX": "ReducerOptions", "RESHAPE": "ReshapeOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions", "SLICE": "SliceOptions", "SOFTMAX": "SoftmaxOptions",
    "SUB": "SubOptions", "TRANSPOSE": "TransposeOptions",
}  # fmt: skip


def read(file: Path) -> List[Operator]:
    """Return the operators of a file in order.

    Raises:
        RuntimeUnavailable: LiteRT is missing.
        EngineError: the file is not of LiteRT's format.
    """
    flat = schema()
    kinds = {value: name for name, value in vars(flat.BuiltinOperator).items() if not name.startswith("_")}
    types = {value: name for name, value in vars(flat.TensorType).items() if not name.startswith("_")}
    try:
        content = file.read_bytes()
        if content[4:8] != IDENTIFIER:
            raise ValueError(f"begins with {content[:8]!r}")
        model = flat.ModelT.InitFromPackedBuf(content, 0)
        graph = model.subgraphs[0]
        tensors = [_tensor(one, model.buffers, types) for one in graph.tensors]
        return [
            Operator(
                kinds[model.operatorCodes[one.opcodeIndex].builtinCode],
                tuple(tensors[index] for index in one.inputs if index >= 0),
                tuple(tensors[index] for index in one.outputs),
            )
            for one in graph.operators
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise EngineError(f"{file}: not a LiteRT file ({error}); build the engine again") from error


def _tensor(stored: Any, buffers: Sequence[Any], types: Dict[int, str]) -> Tensor:
    kind, about, quantised = types[stored.type], stored.quantization, None
    if about is not None and about.scale is not None and len(about.scale):
        quantised = Quantised(np.asarray(about.scale, np.float32), int(about.zeroPoint[0]), about.quantizedDimension)
    data = buffers[stored.buffer].data
    shape = tuple(int(size) for size in (stored.shape if stored.shape is not None else ()))
    values = None
    if data is not None and kind in NUMPY:
        values = np.frombuffer(np.asarray(data, np.uint8).tobytes(), NUMPY[kind]).reshape(shape)
    return Tensor((stored.name or b"").decode("utf-8"), kind, shape, quantised, values)
