"""Write ONNX files of models that are only timed, such as candidates of a latency budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import form_of, insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold


def export_timed(
    model: nn.Module, file: Path, imgsz_hw: tuple[int, int], names: Sequence[str], runtime: str, precision: str
) -> None:
    """Write the ONNX file of a model that is only timed on `runtime` in `precision`.

    The ranges of an INT8 file are those of noise: they do not change the time.
    """
    export_onnx(model, file, imgsz_hw, names=names)
    if precision == "int8":
        channels = int(cast(Any, model).yaml.get("channels", 3))
        noise_BCHW = torch.rand(2, channels, *imgsz_hw, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # noise may leave a tensor at 0, which says nothing about the model
            state = fold(ptq(model, lambda: [noise_BCHW], "max"), model)
        insert_qdq(file, file, state, form_of(runtime))
