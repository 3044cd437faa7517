"""A pruned YOLO26n: its files have the one-to-one branches alone, and INT8 files compute what its fake-quantised model computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.support.quant_net import (
    NAMES,
    SIZE,
    assert_equal_but_for_ties,
    images,
    run_onnx,
    run_torch,
    three_quarters,
    write_forms,
)
from yolo_compress.evaluate.exported_files import open_exported
from yolo_compress.export.float_onnx import export_torchscript
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.torchscript import export_int8_torchscript
from yolo_compress.lint.check import check
from yolo_compress.nets import detect
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.latency import node_prefixes
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach, detach, in_float, read
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.registry import RUNTIMES

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION = ("model.10.m.0.attn", "model.22.m.0.1.attn")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return three_quarters("yolo26n.yaml")


@pytest.fixture(scope="module")
def state(model: nn.Module) -> QuantState:
    return ptq(model, lambda: [images(4)], "max")


@pytest.fixture(scope="module")
def files(model: nn.Module, state: QuantState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_forms(model, state, tmp_path_factory.mktemp("yolo26"))


def test_all_but_attention_and_head_is_int8_and_what_only_training_uses_is_in_no_list(model: nn.Module) -> None:
    placed = plan(model)
    deployed = copy.deepcopy(model)
    detect.deploy(deployed)
    convs = {name for name, module in deployed.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(placed.reads) == convs and len(convs) == 102
    head = {f"model.23.one2one_{branch}.{level}.2" for branch in ("cv2", "cv3") for level in range(3)}
    attention = {f"{block}.{part}.conv" for block in ATTENTION for part in ("pe", "proj")}
    assert {name for name, _ in placed.skipped} == head | attention and len(placed.convs) == 92
    assert not any(
        tensor.startswith(("model.23.cv2", "model.23.cv3")) for group in placed.groups for tensor in group.tensors
    )
    pyramid = placed.group_of("model.9")
    assert {"model.8.cv2", "model.9.cv2", "model.9"} <= set(pyramid.tensors) and not pyramid.why_float
    assert "model.9 (sum)" in pyramid.joins and "model.10.cv1.conv" in pyramid.convs


def test_the_sum_of_the_pyramid_is_calibrated_rounded_and_left_stock(model: nn.Module, state: QuantState) -> None:
    net = copy.deepcopy(model)
    stock = [(name, type(module), sorted(vars(module))) for name, module in net.named_modules()]
    attach(net, state)
    assert read(net).activations == state.activations
    twin = copy.deepcopy(net)
    assert vars(twin.model[9])["forward"].args[0] is twin.model[9], "a copy calls its own layer"
    step, seen = state.activations["model.9"] / 127, list[torch.Tensor]()
    for one in (net, twin):
        one.model[9].register_forward_hook(lambda _, args, out: seen.append(out))
        run_torch(one, images(1))
    with in_float(net, [plan(net).group_of("model.9")]):
        run_torch(net, images(1))
    rounded = [float((x / step - (x / step).round()).abs().max()) for x in seen]
    assert max(rounded[:2]) < 1e-3 < rounded[2]
    for one in (net, twin):
        one.model[9]._forward_hooks.clear()
        detach(one)
        assert [(name, type(module), sorted(vars(module))) for name, module in one.named_modules()] == stock
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_files_compute_what_torch_computes(model: nn.Module, state: QuantState, files: Path, tmp_path: Path) -> None:
    batch = images(16, seed=3)
    floats = run_torch(model, batch)
    assert floats.shape == (16, 7, 84)
    assert np.abs(run_onnx(files / "fp32.onnx", batch) - floats).max() < 0.02  # px
    rounded = detect.fuse(copy.deepcopy(model))
    attach(rounded, fold(state, model))
    expected = run_torch(rounded, batch)
    for form in ("tensorrt10", "openvino"):
        assert_equal_but_for_ties(run_onnx(files / f"{form}.onnx", batch), expected, floats)
    error = np.abs(expected - floats).mean()
    for form in ("tensorrt11", "onnxruntime"):  # rounded scales; rounded outputs of convolutions
        assert 0 < np.abs(run_onnx(files / f"{form}.onnx", batch) - floats).mean() < 2 * error
    export_int8_torchscript(model, tmp_path / "int8.torchscript", SIZE, fold(state, model), names=NAMES)
    script = torch.jit.load(tmp_path / "int8.torchscript")
    got = np.concatenate([script(image[None]).numpy() for image in batch])
    assert 0 < np.abs(got - floats).mean() < 2 * error


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_the_files_have_the_one_to_one_branches_and_say_that_their_boxes_need_no_nms(
    model: nn.Module, files: Path, tmp_path: Path
) -> None:
    graph = onnx.load(files / "fp32.onnx")
    weights = {node.input[1] for node in graph.graph.node if node.op_type == "Conv"}
    assert "model.23.one2one_cv2.0.2.weight" in weights and not any(".23.cv" in name for name in weights)
    about = {item.key: item.value for item in graph.metadata_props}
    assert (about["needs_nms"], about["end2end"]) == ("False", "False")
    assert set(node_prefixes(files / "fp32.onnx", conv_shapes(model, SIZE))) == set(conv_shapes(model, SIZE))
    export_torchscript(model, tmp_path / "model.torchscript", SIZE, names=NAMES)
    with open_exported(tmp_path / "model.torchscript", "fp32", tmp_path) as script:
        assert not script.needs_nms
    with open_exported(files / "onnxruntime.onnx", "int8", tmp_path) as simulated:
        assert not simulated.needs_nms


def test_lint_finds_nothing_misplaced(files: Path) -> None:
    for form, target in (("tensorrt10", "tensorrt-10.13"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        report = check(files / f"{form}.onnx", target)
        assert report.facts["int8_convs"] == 92, target
        assert all(rule.startswith("channels-") for rule in report.rules), (target, report.rules)
    to_fp16(files / "fp32.onnx", files / "fp16.onnx")
    assert all(rule.startswith("channels-") for rule in check(files / "fp16.onnx", "tensorrt-11.4").rules)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ncnn"])
def test_a_cpu_runtime_runs_the_files(files: Path, tmp_path: Path, runtime: str) -> None:
    if problem := BACKENDS[runtime].probe():
        pytest.skip(problem)
    form = RUNTIMES[runtime].int8[0].form if RUNTIMES[runtime].int8 else "tensorrt10"
    batch = images(4, seed=5)
    plain, floats = run_onnx(files / f"{form}.onnx", batch), run_onnx(files / "fp32.onnx", batch)
    for precision, file in (("fp32", "fp32"), ("int8", form)):
        BACKENDS[runtime].build(files / f"{file}.onnx", tmp_path / precision, precision)
        assert json.loads((tmp_path / precision / "engine.json").read_text())["needs_nms"] is False
        with open_engine(tmp_path / precision) as engine:
            got = np.concatenate([engine(image[None].numpy()) for image in batch])
            assert not engine.needs_nms
        if precision == "fp32":
            assert np.abs(got - floats).max() < 0.05  # px
        else:
            assert np.abs(got - floats).mean() < 2 * np.abs(plain - floats).mean()
