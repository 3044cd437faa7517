"""FP16: activations and weights are float16, input, output and decode float32, and boxes are not rounded to float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, shape_inference

from tests.support.quant_net import NAMES, SIZE, images, net, run_onnx
from yolo_compress.errors import NumericsError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import decode_tail, to_fp16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("half")
    export_onnx(net(), folder / "fp32.onnx", SIZE, names=NAMES)
    to_fp16(folder / "fp32.onnx", folder / "fp16.onnx")
    return folder / "fp32.onnx", folder / "fp16.onnx"


def test_types(pair: tuple[Path, Path]) -> None:
    model = shape_inference.infer_shapes(onnx.load(str(pair[1])))
    graph = model.graph
    assert {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)} == {
        "images": TensorProto.FLOAT,
        "output0": TensorProto.FLOAT,
    }
    types = {item.name: item.type.tensor_type.elem_type for item in graph.value_info}
    types |= {item.name: item.data_type for item in graph.initializer}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    half = [node for node in convs if types[node.input[0]] == types[node.input[1]] == TensorProto.FLOAT16]
    assert len(convs) == len(half) == 63  # DFL is not a convolution here and belongs to the decode
    assert sum(node.op_type == "Cast" for node in graph.node) == 7  # the image, and each output convolution
    assert {item.key: item.value for item in model.metadata_props}["precision"] == "fp16"
    assert pair[1].stat().st_size < 0.52 * pair[0].stat().st_size


def test_tail_starts_after_the_output_convolutions(pair: tuple[Path, Path]) -> None:
    graph = onnx.load(str(pair[0])).graph
    tail = set(decode_tail(graph))
    kinds = [node.op_type for node in graph.node if node.name in tail]
    assert kinds.count("Exp") == kinds.count("Sigmoid") == 1 and "Conv" not in kinds
    assert not {"MaxPool", "Resize", "Split"} & set(kinds)


@pytest.mark.parametrize("optimise", [False, True])
def test_close_to_float(pair: tuple[Path, Path], optimise: bool) -> None:
    batch = images(4)
    expected, got = run_onnx(pair[0], batch), run_onnx(pair[1], batch, optimise)
    assert got.dtype == np.float32
    assert np.abs(got - expected)[:, 4:].max() < 0.02
    assert np.abs(got - expected)[:, :4].mean() < 0.1  # px, of boxes of up to 64


def test_boxes_beyond_512_px_keep_their_fraction(tmp_path: Path) -> None:
    export_onnx(net(), tmp_path / "fp32.onnx", (32, 640), names=NAMES)
    to_fp16(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx")
    batch = images(1, size=(32, 640))
    centres = run_onnx(tmp_path / "fp16.onnx", batch)[0, 0]
    far = centres[centres > 520]
    assert len(far) > 10
    assert np.abs(far * 2 - np.rint(far * 2)).max() > 0.05  # float16 has no values between multiples of 0.5 there


def test_runs_on_openvino(pair: tuple[Path, Path]) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(pair[1])), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    batch = images(1)
    got = compiled(batch.numpy())[0]
    assert np.abs(got - run_onnx(pair[0], batch))[:, 4:].max() < 0.02


@pytest.mark.fault(25)
def test_weight_beyond_float16(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(str(pair[0]))
    weight = next(item for item in model.graph.initializer if item.name == "model.3.conv.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = 7e4
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, str(tmp_path / "big.onnx"))
    with pytest.raises(NumericsError, match=r"model\.3\.conv\.weight reaches 70000"):
        to_fp16(tmp_path / "big.onnx", tmp_path / "fp16.onnx")
    assert not (tmp_path / "fp16.onnx").exists()
