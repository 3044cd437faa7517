"""Targets of the check: runtimes, and versions of TensorRT."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_compress.errors import RecipeError
from yolo_compress.runtime import registry

DEFAULT = "tensorrt"
RUNTIMES = registry.names()
TENSORRT = (DEFAULT,)
CPU = registry.names(gpu=False)
# Runtimes that do not read ONNX files themselves.
CONVERTED = tuple(row.name for row in registry.RUNTIMES.values() if row.converter)
# Runtimes whose INT8 activations are UINT8 with zero point 128, and those that take only zero point 0. LiteRT takes both.
UNSIGNED = tuple(row.name for row in registry.RUNTIMES.values() if any(file.zero_point for file in row.int8))
SYMMETRIC = tuple(
    row.name
    for row in registry.RUNTIMES.values()
    if row.name not in UNSIGNED and not ((taken := registry.int8_file(row.takes)) and taken[1].zero_point)
)


@dataclass(frozen=True)
class Target:
    """A runtime, or certain versions of a runtime, that the ONNX file is checked against.

    Attributes:
        name: key of `TARGETS`.
        runtime: name of the runtime, which selects the rules.
        about: versions and devices as text for the report.
        min_opset, max_opset: range of supported opsets. None: no limit is known.
        lowest, highest: range of TensorRT versions (major, minor). (0, 0) for other runtimes.
        dla: the target is the deep learning accelerator of an Orin or Xavier, not its GPU.
        compiled: the check also builds the file with the runtime's own library.
    """

    name: str
    runtime: str
    about: str
    min_opset: int | None
    max_opset: int | None
    lowest: tuple[int, int] = (0, 0)
    highest: tuple[int, int] = (0, 0)
    dla: bool = False
    compiled: bool = False


# Opset limits of TensorRT: operators.md of onnx-tensorrt at each release. The largest are 13 for 8.2, 17 for 8.4 to 8.6,
# 20 for 10.0 to 10.3, 22 for 10.9, 24 from 10.13 on and 25 for 11.4. ONNX Runtime 1.32 loads a Conv of opset 7 to 28 and
# refuses 30. OpenVINO 2026.4 loads opsets 6 to 30 and checks each operator separately.
_ROWS = (
    Target(DEFAULT, DEFAULT, registry.RUNTIMES[DEFAULT].about, *registry.RUNTIMES[DEFAULT].opsets, (8, 5), (11, 4)),
    Target("tensorrt-8.2", "tensorrt", "TensorRT 8.2, JetPack 4.6", 7, 13, (8, 2), (8, 2)),
    Target("tensorrt-8.5", "tensorrt", "TensorRT 8.5, JetPack 5.1", 7, 17, (8, 5), (8, 5)),
    Target("tensorrt-8.6", "tensorrt", "TensorRT 8.6, JetPack 6.0", 7, 17, (8, 6), (8, 6)),
    Target("tensorrt-10.3", "tensorrt", "TensorRT 10.3, JetPack 6.1 and 6.2", 9, 20, (10, 3), (10, 3)),
    Target("tensorrt-10.13", "tensorrt", "TensorRT 10.13, JetPack 7.0 and 7.1", 9, 24, (10, 13), (10, 13)),
    Target("tensorrt-10.16", "tensorrt", "TensorRT 10.16, JetPack 7.2", 9, 24, (10, 16), (10, 16)),
    Target("tensorrt-11.4", "tensorrt", "TensorRT 11.4, JetPack 7.2.2", 9, 25, (11, 4), (11, 4)),
    Target("dla-8.5", "tensorrt", "DLA under TensorRT 8.5, JetPack 5.1", 7, 17, (8, 5), (8, 5), dla=True),
    Target("dla-10.3", "tensorrt", "DLA under TensorRT 10.3, JetPack 6.1 and 6.2", 9, 20, (10, 3), (10, 3), dla=True),
    Target(
        "dla-11.4", "tensorrt", "DLA under TensorRT 11.4.1, AGX Orin, JetPack 7.2.2", 9, 25, (11, 4), (11, 4), dla=True
    ),
    Target(
        "tensorrt-rtx", "tensorrt", "TensorRT-RTX, built here without a GPU", 9, 25, (11, 4), (11, 4), compiled=True
    ),
    *(Target(row.name, row.name, row.about, *row.opsets) for row in registry.RUNTIMES.values() if row.name != DEFAULT),
)
TARGETS = {row.name: row for row in _ROWS}


def target(name: str) -> Target:
    """Return the target whose key in `TARGETS` is `name`.

    Raises:
        RecipeError: The name is unknown.
    """
    if name not in TARGETS:
        raise RecipeError(f"lint target={name}: unknown, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]
