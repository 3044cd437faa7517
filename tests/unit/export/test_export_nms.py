"""NMS in the graph returns the rows of `runtime.detect.post.nms`, on every installed runtime and in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest

from tests.support.quant_net import NAMES, SIZE, images, net, run_onnx
from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.nms import with_nms
from yolo_compress.lint.check import check
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.detect.post import nms
from yolo_compress.runtime.errors import EngineError


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("nms") / "fp32.onnx"
    export_onnx(net(), file, SIZE, names=NAMES)
    return file


@pytest.mark.parametrize(
    ("conf", "iou", "max_det"), [(0.25, 0.7, 300), (0.05, 0.45, 300), (0.05, 0.7, 5), (0.999999, 0.7, 20)]
)
def test_rows_are_those_of_our_nms(fp32: Path, tmp_path: Path, conf: float, iou: float, max_det: int) -> None:
    with_nms(fp32, tmp_path / "nms.onnx", conf, iou, max_det)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(tmp_path / "nms.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    some = 0
    for image in images(4).split(1):
        expected = nms(run_onnx(fp32, image)[0], conf, iou, max_det, multi_label=False)
        for found in (run_onnx(tmp_path / "nms.onnx", image)[0], compiled(image.numpy())[0][0]):
            assert found.shape == (max_det, 6) and found.dtype == np.float32
            kept = found[found[:, 4] > 0]
            assert len(kept) == len(expected) and not found[len(kept) :].any()
            assert np.array_equal(kept[:, 5], expected[:, 5])
            assert np.allclose(kept, expected, atol=1e-3)
        some += len(expected)
    assert some or conf > 0.9


def test_fp16_with_nms_is_recognised_by_its_metadata(fp32: Path, tmp_path: Path) -> None:
    to_fp16(fp32, tmp_path / "fp16.onnx")
    with_nms(tmp_path / "fp16.onnx", tmp_path / "fp16-nms.onnx")
    assert run_onnx(tmp_path / "fp16-nms.onnx", images(1)).shape == (1, 300, 6)
    args = {item.key: item.value for item in onnx.load(str(tmp_path / "fp16-nms.onnx")).metadata_props}["args"]
    assert "'nms': True" in args
    assert not check(tmp_path / "fp16-nms.onnx", "tensorrt-10.3").count("error")
    with pytest.raises(EngineError, match="without NMS"), OrtBackend(tmp_path / "fp16-nms.onnx"):
        pass


def test_a_batch_is_refused(tmp_path: Path) -> None:
    export_onnx(net(), tmp_path / "two.onnx", SIZE, names=NAMES, batch=2)
    with pytest.raises(RecipeError, match="requires a batch of 1, this graph has 2"):
        with_nms(tmp_path / "two.onnx", tmp_path / "nms.onnx")


def test_a_model_that_needs_none_is_refused(tmp_path: Path) -> None:
    export_onnx(net(yaml="yolo26n.yaml"), tmp_path / "fp32.onnx", SIZE, names=NAMES)
    with pytest.raises(RecipeError, match="need no NMS"):
        with_nms(tmp_path / "fp32.onnx", tmp_path / "nms.onnx")
