"""A pruned YOLO11n: INT8 files of every form compute what its fake-quantised model computes, and runtimes run them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
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
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.torchscript import export_int8_torchscript
from yolo_compress.lint.check import check
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach, detach, read
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.registry import RUNTIMES

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = {f"model.10.m.0.attn.{part}.conv" for part in ("pe", "proj")}  # beside the head


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return three_quarters("yolo11n.yaml")


@pytest.fixture(scope="module")
def state(model: nn.Module) -> QuantState:
    return ptq(model, lambda: [images(4)], "max")


@pytest.fixture(scope="module")
def files(model: nn.Module, state: QuantState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_forms(model, state, tmp_path_factory.mktemp("yolo11"))


def test_all_but_attention_and_head_is_int8(model: nn.Module) -> None:
    placed = plan(model)
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert (len(placed.convs), convs) == (79, 88)
    head = {name for name, _ in placed.skipped if name.startswith("model.23.")}
    assert {name for name, _ in placed.skipped} - head == FLOATS and len(head) == 7
    stream = placed.group_of("model.10.cv1")
    assert stream.tensors == ("model.10.cv1", "model.10.m.0.attn.proj", "model.10.m.0", "model.10.m.0.ffn.1")
    assert placed.sums["model.10.m.0"] == (("attn",), ("ffn",))
    floats = {tensor for group in placed.groups if group.why_float for tensor in group.tensors}
    assert {tensor for tensor in floats if ".attn" in tensor} == {f"model.10.m.0.attn{x}" for x in ("", ".qkv", ".pe")}


def test_the_sum_between_attention_and_ffn_is_calibrated(model: nn.Module, state: QuantState) -> None:
    seen: list[float] = []
    block = model.get_submodule("model.10.m.0")
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max()))),
        block.ffn.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max()))),
        block.register_forward_hook(lambda _, args, out: seen.append(float(out.abs().max()))),
    ]
    run_torch(model, images(4))
    for handle in handles:
        handle.remove()
    assert len(seen) == 3 and state.activations["model.10.m.0"] >= max(seen) * (1 - 1e-6)


def test_fake_quantisers_round_both_sums_and_leave_a_stock_model(model: nn.Module, state: QuantState) -> None:
    net = copy.deepcopy(model)
    stock = [(name, type(module)) for name, module in net.named_modules()]
    attach(net, state)
    assert read(net).activations == state.activations
    seen: list[torch.Tensor] = []
    net.get_submodule("model.10.m.0.ffn").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.get_submodule("model.10.m.0").register_forward_hook(lambda _, args, out: seen.append(out))
    run_torch(net, images(1))
    step = state.activations["model.10.m.0"] / 127
    assert len(seen) == 2 and all((x / step - (x / step).round()).abs().max() < 1e-3 for x in seen)
    detach(net)
    assert [(name, type(module)) for name, module in net.named_modules()] == stock
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_files_compute_what_torch_computes(model: nn.Module, state: QuantState, files: Path, tmp_path: Path) -> None:
    batch = images(16, seed=3)
    floats = run_torch(model, batch)
    assert np.abs(run_onnx(files / "fp32.onnx", batch) - floats).max() < 0.02  # px
    rounded = copy.deepcopy(model).fuse(verbose=False)
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


def test_lint_finds_nothing_misplaced(files: Path) -> None:
    for form, target in (("tensorrt10", "tensorrt-10.13"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        report = check(files / f"{form}.onnx", target)
        assert report.facts["int8_convs"] == 79, target
        assert all(rule.startswith("channels-") for rule in report.rules), (target, report.rules)
    to_fp16(files / "fp32.onnx", files / "fp16.onnx")
    assert all(rule.startswith("channels-") for rule in check(files / "fp16.onnx", "tensorrt-11.4").rules)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ncnn"])
def test_a_cpu_runtime_runs_the_int8_file(files: Path, tmp_path: Path, runtime: str) -> None:
    if problem := BACKENDS[runtime].probe():
        pytest.skip(problem)
    file = files / f"{RUNTIMES[runtime].int8[0].form if RUNTIMES[runtime].int8 else 'tensorrt10'}.onnx"
    batch = images(4, seed=5)
    BACKENDS[runtime].build(file, tmp_path / "engine", "int8")
    with open_engine(tmp_path / "engine") as engine:
        got = np.concatenate([engine(image[None].numpy()) for image in batch])
    plain, floats = run_onnx(file, batch), run_onnx(files / "fp32.onnx", batch)
    assert np.abs(got - plain).mean() < 1.5 * np.abs(plain - floats).mean()
