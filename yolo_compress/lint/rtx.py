"""Compile an ONNX file with TensorRT for RTX, which builds ahead of time on a CPU, and list the kernels.

It has the ONNX importer of TensorRT: its messages name the same source files. It is strongly typed, like TensorRT 11. A layer is
therefore INT8 only where Q/DQ nodes request it. Kernels and times hold for RTX cards, not for TensorRT on a Jetson.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_compress.errors import CompressError, EnvironmentLacks

# 1.4 to 1.6 parse INT8 convolutions and then fail: CHECK(dtype == Float || Half || BF16 || FP8)
LEAST_VERSION = (1, 7, 1)
CAPABILITY = "SM86"  # Ampere, like Orin; the library does not offer Orin's own SM87
CONVOLUTION, POOL = "correlation", "maxpool"  # kinds of `Layer`
_KIND = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), ")
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Layer:
    """A kernel of the built engine.

    Attributes:
        kind: the compiler's name of the kind: "correlation" is a convolution, "kgen" a generated pointwise kernel.
        inputs, outputs: element types, for example "Int8", "Half" or "Float".
        onnx: names of the ONNX nodes that the kernel computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx: tuple[str, ...]


def _library() -> Any:
    hint = "pip install 'tensorrt-rtx-cu13>=1.7.1'"
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        raise EnvironmentLacks(f"tensorrt_rtx cannot be imported ({error}); {hint}") from error
    version = tuple(int(part) for part in re.findall(r"\d+", tensorrt_rtx.__version__)[:3])
    if version < LEAST_VERSION:
        raise EnvironmentLacks(f"TensorRT-RTX {tensorrt_rtx.__version__} cannot compile INT8 convolutions; {hint}")
    return tensorrt_rtx


def version() -> str:
    """Return the version of TensorRT-RTX."""
    return str(_library().__version__)


def compile_layers(onnx: Path, capability: str = CAPABILITY) -> list[Layer]:
    """Build an engine and return its kernels in the order of execution. The engine is discarded.

    Args:
        onnx: ONNX file with fixed shapes.
        capability: Name in `tensorrt_rtx.ComputeCapability`.

    Raises:
        EnvironmentLacks: TensorRT-RTX 1.7.1 or later is not installed.
        CompressError: The build failed. The message contains the compiler's error.
    """
    trt = _library()
    lines: list[str] = []
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.extend(message.split("\n"))
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        words = parser.get_error(0).desc() if parser.num_errors else "; ".join(errors)
        raise CompressError(f"{onnx}: TensorRT-RTX {trt.__version__} cannot read it: {words.strip()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    if builder.build_serialized_network(network, config) is None:
        raise CompressError(f"{onnx}: TensorRT-RTX {trt.__version__} cannot build it: {'; '.join(errors[:2]).strip()}")
    layers = [layer for layer in map(_layer, lines) if layer is not None]
    if not layers:
        raise CompressError(
            f"{onnx}: TensorRT-RTX {trt.__version__} lists no layer in its build log; report this as a bug"
        )
    return layers


def _layer(line: str) -> Layer | None:
    """Parse a line of the build log. Return None if it does not describe a layer."""
    match = _KIND.match(line)
    if match is None:
        return None
    cuts = [line.find(word) for word in ("Inputs: ", "Constants: ", "Outputs: ", "TacticName: ")]
    ends = [cut if cut >= 0 else len(line) for cut in cuts]
    inputs = line[ends[0] : min(ends[1], ends[2])]
    outputs = line[ends[2] : ends[3]]
    into, out = (tuple(_DATATYPE.findall(part)) for part in (inputs, outputs))
    return Layer(match["name"], match["kind"], into, out, tuple(_ONNX.findall(line)))
