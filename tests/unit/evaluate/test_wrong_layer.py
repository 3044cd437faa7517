"""The layer that a library computes wrongly is named. The library is one that changes the weights of a layer when it builds."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from tests.support.quant_net import NAMES, SIZE, images, net
from yolo_compress.evaluate import wrong_layer
from yolo_compress.evaluate.wrong_layer import JUMP, LEAST_ERROR, first_wrong_layer
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.runtime.engine import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
RUNTIME = "onnxruntime"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("layers"), net()
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", state, BACKENDS[RUNTIME].form())
    return folder / "int8.onnx"


def breaking(layer: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """A library that turns the weights of this convolution around."""

    def wrong(part: Path, out: Path, *rest: Any) -> Any:
        model = onnx.load(str(part))
        made_by = {output: node for node in model.graph.node for output in node.output}
        for node in model.graph.node:
            if node.name == layer:
                codes = made_by[node.input[1]].input[0]
                stored = next(one for one in model.graph.initializer if one.name == codes)
                stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored)[::-1].copy(), codes))
        onnx.save(model, str(part.with_suffix(".wrong.onnx")))
        return build(part.with_suffix(".wrong.onnx"), out, *rest)

    return wrong


@pytest.mark.parametrize("layer", ["/model.2/cv2/conv/Conv", "/model.4/m.0/cv1/conv/Conv"])
def test_the_layer_that_a_library_computes_wrongly_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    monkeypatch.setattr(BACKENDS[RUNTIME], "build", staticmethod(breaking(layer, BACKENDS[RUNTIME].build)))
    assert first_wrong_layer(file, RUNTIME, images(1)[0].numpy()).startswith(
        f"the first wrong layer is {layer} (error "
    )


def test_without_a_fault_no_error_jumps(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In random weights, rounding grows from layer to layer, but by less than a wrong layer adds. The first 24 parts show it."""
    parts = wrong_layer._parts
    monkeypatch.setattr(wrong_layer, "_parts", lambda file: islice(parts(file), 24))
    found = first_wrong_layer(file, RUNTIME, images(1)[0].numpy())
    error, before = (float(number) for number in re.findall(r"[0-9.e-]{3,}(?=[, ])", found.partition("(")[2]))
    assert found.startswith("no layer's error jumps; it grows most at /model.") and error <= JUMP * max(
        before, LEAST_ERROR
    ), found
