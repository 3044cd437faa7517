"""Files without an engine on this machine are evaluated too, and give the INT8 values of fake quantisation in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, net, run_onnx, run_torch
from yolo_compress.errors import CompressError, CorruptArtifact
from yolo_compress.evaluate.exported_files import For, check_nms, made_for, open_exported
from yolo_compress.export.calibration_cache import CACHE, IMPLICIT, read_cache, write_explicit, write_implicit
from yolo_compress.export.float_onnx import export_onnx, export_torchscript
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.nms import with_nms
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.export.torchscript import export_int8_torchscript
from yolo_compress.quant import saturation
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach
from yolo_compress.quant.ranges import QuantState, fold


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantState]:
    file, model = tmp_path_factory.mktemp("float") / "fp32.onnx", net()
    export_onnx(model, file, SIZE, names=NAMES, opset=19)
    return file, fold(ptq(model, lambda: [images(4)], "max"), model)


def run(file: Path, precision: str, scratch: Path) -> np.ndarray:
    with open_exported(file, precision, scratch) as backend:
        assert backend.precision == precision and list(backend.names) == list(NAMES)
        return np.concatenate([backend(image.numpy()) for image in images(8, seed=3).split(1)])


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("target", ["tensorrt10", "openvino"])
def test_a_file_computes_what_training_saw(
    source: tuple[Path, QuantState], tmp_path: Path, target: str, bits: int
) -> None:
    file, state, model = source[0], replace(source[1], weight_bits=bits), net().fuse(verbose=False)
    expected_float = run_torch(model, images(8, seed=3))
    insert_qdq(file, tmp_path / "int8.onnx", state, target)
    attach(model, state)
    got = run(tmp_path / "int8.onnx", "int8", tmp_path)
    assert_equal_but_for_ties(got, run_torch(model, images(8, seed=3)), expected_float)


def test_float16_between_the_codes_is_run(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """The error is not compared: a model with random weights amplifies float16 rounding to the error of INT8 itself."""
    insert_qdq(source[0], tmp_path / "codes.onnx", source[1], "tensorrt11")
    to_fp16(tmp_path / "codes.onnx", tmp_path / "int8-tensorrt11.onnx", "int8")
    halves, floats = (
        run(tmp_path / "int8-tensorrt11.onnx", "int8", tmp_path),
        run(tmp_path / "codes.onnx", "int8", tmp_path),
    )
    assert np.isfinite(halves).all() and not np.array_equal(halves, floats)
    assert np.corrcoef(halves[:, 4:].ravel(), floats[:, 4:].ravel())[0, 1] > 0.9


def test_the_calibration_cache_gives_the_trained_weights_back(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """TensorRT computes weight ranges from the graph: 8 bits change weights on the 7-bit grid by a quarter of a step at most."""
    file, state = source
    write_implicit(file, tmp_path / IMPLICIT, state)
    stored = {item.name: numpy_helper.to_array(item) for item in onnx.load(str(tmp_path / IMPLICIT)).graph.initializer}
    write_explicit(tmp_path / IMPLICIT, tmp_path / "explicit.onnx")
    graph = onnx.load(str(tmp_path / "explicit.onnx")).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for name, amax_C in state.weights.items():
        step_C111 = (np.float32(amax_C) / 63).reshape(-1, 1, 1, 1)
        on_grid = stored[f"{name}.weight"] / step_C111
        assert np.allclose(on_grid, np.rint(on_grid), atol=1e-3)
        codes, scale_C = values[f"{name}.weight_quantized"], values[f"{name}.weight_scale"].reshape(-1, 1, 1, 1)
        assert np.abs(codes * scale_C - stored[f"{name}.weight"]).max() <= 0.26 * step_C111.max()
    float_ones = {node.input[1] for node in graph.node if node.op_type == "Conv"} & set(stored)
    assert len(float_ones) == 6  # the head's outputs
    got = run(tmp_path / IMPLICIT, "int8", tmp_path)
    assert np.abs(got - run_onnx(file, images(8, seed=3))).max() > 1e-4  # INT8, not the float graph
    assert all(scale > 0 for scale in read_cache(tmp_path / CACHE).values())
    (tmp_path / CACHE).write_text("TRT-8502-EntropyCalibration2\nno tensor of it: 3c010a14\n")
    with pytest.raises(CorruptArtifact, match="has no tensor of that name"):
        write_explicit(tmp_path / IMPLICIT, tmp_path / "explicit.onnx")
    for text in (
        "images: zz\n",
        "TRT-8502-x\nimages: 7fc00000\n",
        "TRT-8502-x\nimages: bf800000\n",
        "TRT-8502-x\nimages: 00000000\n",
    ):
        (tmp_path / CACHE).write_text(text)
        with pytest.raises(CorruptArtifact, match="not a calibration cache"):
            read_cache(tmp_path / CACHE)


def test_torchscript_is_evaluated_as_torch_runs_it(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    model = net()
    export_torchscript(model, tmp_path / "model.torchscript", SIZE, names=NAMES)
    export_int8_torchscript(model, tmp_path / "int8.torchscript", SIZE, source[1], names=NAMES)
    floats, codes = (
        run(tmp_path / f"{stem}.torchscript", kind, tmp_path) for stem, kind in (("model", "fp32"), ("int8", "int8"))
    )
    assert np.allclose(floats, run_torch(model, images(8, seed=3)), atol=1e-2)
    assert not np.allclose(floats, codes, atol=1e-4)


def test_the_runtime_and_precision_of_each_file() -> None:
    expected = {
        "compressed/fp32.onnx": For("onnx", "fp32"),
        "compressed/fp16.onnx": For("onnx", "fp16"),
        "original/int8.onnx": For("tensorrt", "int8"),
        "original/int8-tensorrt11.onnx": For("tensorrt11", "int8"),
        "compressed/int8-openvino.onnx": For("openvino", "int8"),
        "compressed/int8-implicit.onnx": For("tensorrt-cache", "int8"),
        "compressed/int8-implicit.cache": None,
        "compressed/int8-nms.onnx": None,
        "compressed/model.torchscript": For("torchscript", "fp32"),
        "compressed/int8.torchscript": For("torchscript", "int8"),
    }
    assert {file: made_for(file) for file in expected} == expected


def test_where_tensorrt_11_is_installed_the_other_file_is_for_the_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_compress.runtime.backends.tensorrt.run.strongly_typed", lambda: True)
    assert made_for("compressed/int8-tensorrt11.onnx") == For("tensorrt", "int8")
    assert made_for("compressed/int8.onnx") == For("tensorrt10", "int8")


def test_nms_in_the_graph_is_compared_with_nms_behind_it(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    letterboxed = [image.numpy()[0] for image in images(4).split(1)]
    with_nms(source[0], tmp_path / "fp32-nms.onnx")
    assert check_nms(tmp_path / "fp32-nms.onnx", source[0], letterboxed) > 0
    with_nms(source[0], tmp_path / "other-nms.onnx", iou=0.1)
    with pytest.raises(CompressError, match="other-nms.onnx does not give what fp32.onnx with NMS gives"):
        check_nms(tmp_path / "other-nms.onnx", source[0], letterboxed)


def test_saturation_is_seen_in_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test halves the sums, as a processor without VNNI does when it clips two products of 255 * 127 to 16 bits."""
    assert not saturation.saturates("onnxruntime") or "avx512_vnni" not in Path("/proc/cpuinfo").read_text()
    opened = saturation.open_engine

    class Clipped:
        def __init__(self, backend: object) -> None:
            self.backend = backend

        def __call__(self, images_BCHW: np.ndarray) -> np.ndarray:
            output: np.ndarray = self.backend(images_BCHW)  # type: ignore[operator]
            return output / np.float32(255 * 127 * 2 / (2**15 - 1))

        def __enter__(self) -> Clipped:
            return self

        def __exit__(self, *exception: object) -> None:
            self.backend.__exit__(*exception)  # type: ignore[attr-defined]

    monkeypatch.setattr(saturation, "open_engine", lambda folder: Clipped(opened(folder)))
    assert saturation.saturates("onnxruntime")
