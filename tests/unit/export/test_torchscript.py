"""INT8 TorchScript has the INT8 values of the ONNX form on every engine, and its file needs only torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, net, run_torch
from yolo_compress.errors import CompressError, CorruptArtifact, EnvironmentLacks, RecipeError
from yolo_compress.export import torchscript
from yolo_compress.export.float_onnx import export_onnx, prepare
from yolo_compress.export.qdq import find_convs, insert_qdq
from yolo_compress.export.torchscript import ZERO_POINT, Int8Conv, convert_to_int8, export_int8_torchscript
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import QuantState, before_silu, fold

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        r"ignore:torch\.quantize_per_tensor.* deprecated:UserWarning",
        r"ignore:`torch\.jit\.load` is deprecated:FutureWarning",
    ),
]
HERE = [
    engine for engine in ("fbgemm", "x86", "onednn", "qnnpack") if engine in torch.backends.quantized.supported_engines
]


@pytest.fixture(scope="module")
def state() -> QuantState:
    model = net()
    return fold(ptq(model, lambda: [images(4)], "max"), model)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, state: QuantState) -> Path:
    file = tmp_path_factory.mktemp("torchscript") / "int8.torchscript"
    export_int8_torchscript(net(), file, SIZE, state, names=NAMES)
    return file


@contextmanager
def engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def quantised(x: torch.Tensor, amax: float) -> torch.Tensor:
    return torch.quantize_per_tensor(x, amax / 127, ZERO_POINT, torch.quint8)


def run(file: Path, batch: torch.Tensor) -> np.ndarray:
    traced = torch.jit.load(str(file))
    with torch.no_grad():
        return np.concatenate([traced(image).numpy() for image in batch.split(1)])


@pytest.mark.parametrize("name", HERE)
def test_each_convolution_gives_the_codes_of_the_onnx_form(state: QuantState, tmp_path: Path, name: str) -> None:
    """With the INT8 inputs of ONNX Runtime (no fusion), each convolution has its INT8 outputs except for rounding ties."""
    export_onnx(net(), tmp_path / "fp32.onnx", SIZE, names=NAMES)
    convs = find_convs(onnx.load(str(tmp_path / "fp32.onnx")).graph, state.convs)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", state, "onnxruntime")
    graph = onnx.load(str(tmp_path / "int8.onnx"))
    ends = {conv: (f"{node.input[0]}_Q", f"{node.output[0]}_Q") for conv, node in convs.items()}
    tensors = sorted({tensor for pair in ends.values() for tensor in pair})
    graph.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen = dict(zip(tensors, session.run(tensors, {"images": images(1, seed=3).numpy()}), strict=True))
    coded = prepare(net(), SIZE, NAMES, 1, "torchscript")[0]
    reads = plan(coded).reads
    with engine(name):
        convert_to_int8(coded, state)
        for conv, (into, out) in ends.items():
            module: Any = coded.get_submodule(conv)
            module = module[1] if reads[conv] == "images" else module
            values = (torch.from_numpy(seen[into]).float() - ZERO_POINT) * (state.activations[reads[conv]] / 127)
            codes = quantised(values, state.activations[reads[conv]])
            assert np.array_equal(codes.int_repr().numpy(), seen[into])
            difference = np.abs(module(codes).int_repr().numpy().astype(int) - seen[out])
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01, conv


def rounded(amax: float) -> Callable[..., torch.Tensor]:
    """A forward hook that rounds the output of a module to INT8 and back."""
    return lambda module, args, made: torch.fake_quantize_per_tensor_affine(made, amax / 127, 0, -128, 127)


def simulated(state: QuantState) -> nn.Module:
    """The same model in float: every tensor and weight with a range is rounded to INT8 and back."""
    model = net().fuse(verbose=False)
    for name, amax_C in state.weights.items():
        conv, scale_C = model.get_submodule(name), torch.tensor(amax_C) / 63
        zero_C = torch.zeros(len(amax_C), dtype=torch.int32)
        conv.weight.data = torch.fake_quantize_per_channel_affine(conv.weight.data, scale_C, zero_C, 0, -63, 63)
        block = name.removesuffix(".conv")
        scale, zero = state.outputs[name] / 127, ZERO_POINT
        if block in state.activations and isinstance(getattr(model.get_submodule(block), "act", None), nn.SiLU):
            scale, zero = before_silu(state.outputs[name], state.activations[block])
        conv.register_forward_hook(
            lambda module, args, x, s=scale, z=zero: torch.fake_quantize_per_tensor_affine(x, s, z, 0, 255)
        )
    for name, amax in state.activations.items():
        if name == "images":
            model.register_forward_pre_hook(lambda module, args, amax=amax: (rounded(amax)(module, (), args[0]),))
        else:
            model.get_submodule(name).register_forward_hook(rounded(amax))
    return model


def test_the_network_computes_what_its_simulation_in_float_computes(written: Path, state: QuantState) -> None:
    batch = images(16, seed=3)
    expected_float, expected = run_torch(net(), batch), run_torch(simulated(state), batch)
    got = run(written, batch)
    assert got.shape == expected.shape and got.dtype == np.float32
    assert_equal_but_for_ties(got, expected, expected_float)


def test_all_that_is_planned_computes_on_codes_and_nothing_else(written: Path, state: QuantState) -> None:
    config = {"config.txt": ""}
    traced = torch.jit.load(str(written), _extra_files=config)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("quantized::conv2d") == len(state.convs) == 57
    assert kinds.count("aten::_convolution") == 6  # the head's output convolutions
    assert kinds.count("quantized::add") == 6
    assert kinds.count("aten::quantize_per_tensor") == 1 + 51  # images; the outputs of 6 blocks of the head stay float
    described = json.loads(config["config.txt"])
    assert (described["precision"], described["imgsz"], described["batch"]) == ("int8", [64, 64], 1)


def test_groups_left_in_float_stay_float(state: QuantState, tmp_path: Path) -> None:
    placed = plan(net())
    left = [placed.group_of(tensor) for tensor in ("images", "model.2.m.0.cv1", "model.22.cv3.0.0")]
    part = state.without(left)
    export_int8_torchscript(net(), tmp_path / "part", SIZE, part, names=NAMES, batch=2)
    traced = torch.jit.load(str(tmp_path / "part"))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    floats = sum(len(group.convs) for group in left)
    assert kinds.count("quantized::conv2d") == 57 - floats and kinds.count("aten::_convolution") == 6 + floats
    with torch.no_grad():
        assert traced(images(2)).shape == (2, 7, 84)


@pytest.mark.parametrize("name", HERE)
def test_a_dead_channel_gives_its_bias_on_every_engine(name: str) -> None:
    """QNNPACK stores a bias as INT32 in units of the weight scale: with weights of 0 it would overflow."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 4, 3, padding=1)
    conv.weight.data[0], conv.weight.data[1] = 0.0, conv.weight.data[1] * 1e-9
    conv.bias.data = torch.tensor([5.0, -5.0, 0.1, -0.1])
    x, amax_C = torch.rand(1, 16, 8, 8) * 2 - 1, conv.weight.abs().amax((1, 2, 3)).clamp_min(1e-6)
    with torch.no_grad(), engine(name):
        coded = Int8Conv(conv, tuple(amax_C.tolist()), 1.0, 8.0 / 127, 128, 63)
        codes = quantised(x, 1.0)
        difference = coded(codes).dequantize() - conv(codes.dequantize())
    assert difference[:, :2].abs().max() <= 0.51 * 8 / 127 and difference.abs().max() <= 1.1 * 8 / 127


def test_weights_trained_beyond_their_range_are_clipped_to_7_bits() -> None:
    conv = nn.Conv2d(4, 4, 1)
    amax = conv.weight.abs().amax((1, 2, 3)) / 2
    coded = Int8Conv(conv, tuple(amax.tolist()), 1.0, 1.0 / 127, 128, 63)
    codes = torch.ops.quantized.conv2d_unpack(coded.packed)[0].int_repr()
    expected = (conv.weight.detach() / amax.view(-1, 1, 1, 1) * 63).round().clamp(-63, 63)
    assert torch.equal(codes.float(), expected) and codes.abs().max() == 63


@pytest.mark.parametrize("name", HERE)
def test_sums_of_the_largest_codes_do_not_saturate(name: str) -> None:
    """With weights of 8 bits fbgemm and oneDNN give 1 instead of 64 on a processor without VNNI."""
    conv = nn.Conv2d(64, 8, 1, bias=False)
    conv.weight.data.fill_(1.0)
    with torch.no_grad(), engine(name):
        made = Int8Conv(conv, (1.0,) * 8, 1.0, 1.0, 128, 63)(quantised(torch.ones(1, 64, 16, 16), 1.0))
    assert made.dequantize().unique().tolist() == [64.0]


@pytest.mark.slow
def test_a_fresh_process_with_torch_alone_runs_it_on_every_engine(written: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['yolo_compress'] = sys.modules['ultralytics'] = None\n"
        "import torch; file, batch, out, *engines = sys.argv[1:]; torch.set_num_threads(1); made = []\n"
        "for engine in [torch.backends.quantized.engine, *engines]:\n"
        "    torch.backends.quantized.engine = engine\n"
        "    with torch.no_grad(): made.append(torch.jit.load(file)(torch.load(batch)))\n"
        "torch.save(made, out)\n"
    )
    torch.save(images(1, seed=3), tmp_path / "batch")
    words = [str(written), str(tmp_path / "batch"), str(tmp_path / "made"), *HERE]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    made = torch.load(tmp_path / "made")
    for name, output in zip([torch.backends.quantized.engine, *HERE], made, strict=True):
        with engine(name):
            assert np.array_equal(output.numpy(), run(written, images(1, seed=3))), name


@pytest.mark.slow
def test_stock_ultralytics_runs_it(written: Path) -> None:
    code = (
        "import sys; sys.modules['yolo_compress'] = None\n"
        "import numpy as np; from ultralytics import YOLO\n"
        "found = YOLO(sys.argv[1], task='detect')(np.zeros((64, 64, 3), np.uint8), imgsz=64, conf=0.001, verbose=False)\n"
        "print(found[0].names, len(found[0].boxes))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(written)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"},
    )
    assert done.returncode == 0, done.stderr
    names, _, boxes = done.stdout.splitlines()[-1].rpartition(" ")
    assert names == str(dict(enumerate(NAMES))) and int(boxes) > 0


def test_a_state_that_does_not_fit_is_refused(
    state: QuantState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = tmp_path / "int8.torchscript", state.convs[0]
    fused = prepare(net(), SIZE, NAMES, 1, "torchscript")[0]
    some = {name: amax for name, amax in state.outputs.items() if name != first}
    wider = {**state.activations, "model.19": 2 * state.activations["model.19"]}
    weights = dict(state.weights)
    for wrong, message in (
        (replace(state, folded=False), "not folded"),
        (replace(state, outputs={}), r"no output range for 57 convolutions \(model\.0\.conv, .*run qat again"),
        (replace(state, outputs=some), rf"output range for 1 convolutions \({first}"),
        (replace(state, activations={**state.activations, "model.99": 1.0}), r"has no model\.99"),
        (replace(state, activations=wider), "have to share a scale"),
        (replace(state, weights={**weights, first: weights[first][1:]}), "16 output channels in the model, 15 in"),
        (
            replace(state, weights={k: v for k, v in weights.items() if k != first}),
            "reads INT8 .images., but has no weight",
        ),
    ):
        with pytest.raises(CorruptArtifact, match=message):
            convert_to_int8(fused, wrong)
    with pytest.raises(RecipeError, match="stride 32"):
        export_int8_torchscript(net(), out, (100, 64), state, names=NAMES)
    monkeypatch.setattr(torchscript, "ENGINES", ("none of these",))
    with pytest.raises(EnvironmentLacks, match=r"torch .* has none of the engines.*export\.torchscript=false"):
        export_int8_torchscript(net(), out, SIZE, state, names=NAMES)
    monkeypatch.undo()
    monkeypatch.setattr(torchscript, "convert_to_int8", lambda net, state: None)
    with pytest.raises(CompressError, match="0 convolutions are INT8, expected 57"):
        export_int8_torchscript(net(), out, SIZE, state, names=NAMES)
    assert not out.exists()
