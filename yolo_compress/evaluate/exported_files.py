"""Evaluate exported files from which no engine can be built on this machine. Every file for a robot then has an accuracy.

ONNX Runtime with its optimiser off executes a Q/DQ graph node by node. This is the arithmetic that `quant.fakequant` trains
(tests/unit/export/test_exported_files.py). Rounding inside the fused kernels of an engine is not simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import numpy as np
import torch

from yolo_compress.errors import CompressError
from yolo_compress.evaluate.rows import Precision
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.calibration_cache import IMPLICIT, write_explicit
from yolo_compress.export.float_onnx import quiet_trace
from yolo_compress.export.nms import NMS_CONF, NMS_IOU, NMS_SUFFIX
from yolo_compress.runtime.backends.base import Backend
from yolo_compress.runtime.backends.onnx_metadata import NEEDS_NMS
from yolo_compress.runtime.backends.ort import OrtBackend, open_session
from yolo_compress.runtime.detect.post import nms
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.max_detections import MAX_DET
from yolo_compress.runtime.measure.device import usable_cpus
from yolo_compress.runtime.measure.golden import difference
from yolo_compress.runtime.registry import int8_file

NMS_PX, NMS_SCORE = 0.01, 1e-5  # tolerance for float32 operations in another order


class For(NamedTuple):
    """The runtime and precision that a file is made for."""

    runtime: str
    precision: Precision


def made_for(file: str) -> For | None:
    """Return the runtime and precision that an exported file is made for, read from the file's name.

    The result is None if the file is not a model. It is also None if its graph contains NMS, because `export` has checked it.
    """
    path = PurePosixPath(file)
    precision = cast(Precision, path.stem.partition("-")[0])
    if path.suffix == ".torchscript":
        return For("torchscript", "int8" if precision == "int8" else "fp32")
    if path.suffix != ".onnx" or path.stem.endswith(NMS_SUFFIX):
        return None
    known = int8_file(path.stem)
    if known is None:
        return For("onnx", precision)
    runtime, made = known
    return For(runtime.name if BACKENDS[runtime.name].form() == made.form else made.form, precision)


def literal(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that runs an ONNX graph node by node, without fusion. The graph has one input and one output."""
    session = open_session(file, usable_cpus(), "none")
    name = session.get_inputs()[0].name

    def run(images_BCHW: np.ndarray) -> np.ndarray:
        output: np.ndarray = session.run(None, {name: images_BCHW})[0]
        return output

    return run


def check_nms(file: Path, source: Path, images: Iterable[np.ndarray], max_det: int = MAX_DET) -> int:
    """Check that NMS inside a graph gives the same boxes as the source graph, followed by the NMS of `runtime.detect.post`.

    Args:
        file: Output of `with_nms` with its default thresholds and `max_det`.
        source: The graph without NMS from which `file` was made.
        images: Letterboxed chw_3HW float32 arrays.

    Returns:
        The number of boxes that were compared.

    Raises:
        CompressError: The boxes differ.
    """
    with_graph, plain = literal(file), literal(source)
    found, expected = list[np.ndarray](), list[np.ndarray]()
    for chw_3HW in images:
        rows_N6 = with_graph(chw_3HW[None])[0]
        found.append(rows_N6[rows_N6[:, 4] > 0])
        expected.append(nms(plain(chw_3HW[None])[0], NMS_CONF, NMS_IOU, max_det, multi_label=False))
    apart = difference(expected, found, NMS_CONF)
    if apart.unmatched or apart.worst_box_px > NMS_PX or apart.worst_score > NMS_SCORE:
        raise CompressError(
            f"{file.name} does not give what {source.name} with NMS gives on {len(found)} images: boxes {apart.worst_box_px:.2g} px, "
            f"scores {apart.worst_score:.2g} apart, {apart.unmatched} without partner, which is a bug here; set export.nms=false"
        )
    return apart.compared


class Simulated(OrtBackend):
    """Backend that executes an ONNX file node by node."""

    def __init__(self, file: Path, precision: str, shown: str) -> None:
        super().__init__(file, precision=precision, optimisation="none")
        self._shown = shown

    @property
    def executed(self) -> str:
        """Text for `Backend.executed`, with the name of the file."""
        return f"simulated, {self._shown} node by node"


def open_exported(file: Path, precision: str, scratch: Path) -> Backend:
    """Return a backend for an exported file from which no engine can be built on this machine.

    Args:
        file: A file for which `made_for` is not None.
        precision: Precision of the file.
        scratch: Folder for temporary files.

    Raises:
        EngineError: The runtime rejects the file.
    """
    if file.suffix == ".torchscript":
        return _TorchScript(file)
    shown = file.name
    if file.name == IMPLICIT:
        write_explicit(file, scratch / "explicit.onnx")
        file = scratch / "explicit.onnx"
    return Simulated(file, precision, shown)


class _TorchScript(TorchBackend):
    """Backend for a TorchScript file. Its class names, imgsz, batch and channels are in its `config.txt`."""

    def __init__(self, file: Path) -> None:
        extra_files = {"config.txt": ""}
        with quiet_trace():
            module = torch.jit.load(str(file), map_location="cpu", _extra_files=extra_files)
        about = json.loads(extra_files["config.txt"])
        height, width = about["imgsz"]
        super().__init__(module.eval(), tuple(about["names"].values()), (height, width))
        self.batch, self.channels = about["batch"], about["channels"]
        self.precision = about.get("precision", "fp32")
        self.needs_nms = about.get(NEEDS_NMS, True)
