"""NVIDIA's importer and compiler run every layer in INT8 that the plan places in INT8."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.quant_net import NAMES, SIZE, images, net
from yolo_compress.errors import CompressError, EnvironmentLacks
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.lint import compiler, rtx
from yolo_compress.lint.check import check
from yolo_compress.lint.rtx import CONVOLUTION, POOL, Layer, compile_layers
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import fold

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")


def exported(folder: Path, model: torch.nn.Module) -> Path:
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    state = fold(ptq(model, lambda: [images(2)], "max"), model)
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", state, "tensorrt10")
    return folder / "int8.onnx"


def pruned() -> torch.nn.Module:
    model = net()
    prune(model, {group.name: torch.arange(0, group.width - group.width // 4) for group in prunable(model)})
    return model


def assert_int8_as_planned(file: Path, model: torch.nn.Module) -> None:
    layers = compile_layers(file)
    convs = [layer for layer in layers if layer.kind == CONVOLUTION]
    int8 = {name for layer in convs if set(layer.inputs) == {"Int8"} for name in layer.onnx if name.endswith("_DQ")}
    placed = plan(model)
    assert {f"{name}.weight_DQ" for name in placed.convs} <= int8
    kinds = Counter(kind for layer in convs for kind in set(layer.inputs))
    assert kinds == {"Int8": len(placed.convs), "Float": len(placed.skipped) - 1}  # DFL is no convolution here
    pools = [layer for layer in layers if layer.kind == POOL]
    assert len(pools) == 3 and all({*layer.inputs, *layer.outputs} == {"Int8"} for layer in pools)
    sums = [layer for layer in layers if any(name.endswith("/Add") and "/m." in name for name in layer.onnx)]
    assert len(sums) == sum(joined.endswith("(sum)") for group in placed.int8 for joined in group.joins)
    for layer in sums:  # the residual input is INT8, the other input float, the output INT8
        assert "Int8" in layer.inputs and set(layer.outputs) == {"Int8"}, layer.name


@pytest.mark.slow
def test_every_planned_convolution_pool_and_sum_is_int8(tmp_path: Path) -> None:
    model = net()
    file = exported(tmp_path, model)
    assert_int8_as_planned(file, model)
    report = check(file, "tensorrt-rtx")
    assert not {"rtx-refused", "rtx-float"} & set(report.rules)


def test_an_int8_graph_in_half_precision_has_no_float32_convolution(tmp_path: Path) -> None:
    model = net()
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=NAMES, opset=19)
    state = fold(ptq(model, lambda: [images(2)], "max"), model)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", state, "tensorrt11")
    to_fp16(tmp_path / "int8.onnx", tmp_path / "half.onnx", "int8")
    kinds = Counter(layer.inputs for layer in compile_layers(tmp_path / "half.onnx") if layer.kind == CONVOLUTION)
    assert kinds == {("Int8",): 57, ("Half",): 6}


@pytest.mark.slow
def test_a_pruned_net_too(tmp_path: Path) -> None:
    model = pruned()
    assert_int8_as_planned(exported(tmp_path, model), model)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["s", "l"])
def test_larger_nets_too(tmp_path: Path, size: str) -> None:
    model = net(yaml=f"yolov8{size}.yaml")
    assert_int8_as_planned(exported(tmp_path, model), model)


@pytest.mark.slow
def test_an_error_of_the_compiler_is_reported_with_its_message(tmp_path: Path) -> None:
    model = net()
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=NAMES)
    state = fold(ptq(model, lambda: [images(2)], "max"), model)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "uint8.onnx", state, "openvino")
    with pytest.raises(CompressError, match=r"uint8\.onnx: TensorRT-RTX .* cannot read it: .*zero point"):
        compile_layers(tmp_path / "uint8.onnx")
    report = check(tmp_path / "uint8.onnx", "tensorrt-rtx")
    assert report.rules["rtx-refused"] == 1 and report.count("error") > 1


def test_without_the_library_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx as library

    monkeypatch.setattr(library, "__version__", "1.6.0")
    with pytest.raises(EnvironmentLacks, match=r"1\.6\.0 cannot compile INT8 convolutions; pip install"):
        compile_layers(Path("any.onnx"))
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(EnvironmentLacks, match="cannot be imported"):
        rtx.version()


def test_a_layer_that_the_compiler_runs_in_float_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(onnx: Path) -> list[Layer]:
        into = {"/model.1/conv/Conv": ("Float",), "/model.3/conv/Conv": ("Int8",)}
        return [Layer(name, CONVOLUTION, types, ("Float",), (name,)) for name, types in into.items()]

    monkeypatch.setattr(compiler, "compile_layers", made_up)
    report = check(exported(tmp_path, net()), "tensorrt-rtx")
    assert [(one.node, one.what) for one in report.findings if one.rule == "rtx-float"] == [
        ("/model.1/conv/Conv", "reads Float")
    ]
