"""LiteRT: the file computes what the ONNX file computes, and its INT8 tensors have the scales and values of the plan."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from tests.support.quant_net import NAMES, SIZE, images, in_float32, net, run_onnx
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.quant.saturation import saturates
from yolo_compress.runtime.backends import litert_convert
from yolo_compress.runtime.backends.litert import FILE, LiteRtBackend
from yolo_compress.runtime.backends.litert_convert import convert
from yolo_compress.runtime.backends.litert_file import INT8, Operator, Quantised, Tensor, read
from yolo_compress.runtime.commands import bench, build, detect
from yolo_compress.runtime.errors import EngineError, NotConverted, RuntimeUnavailable
from yolo_compress.runtime.measure import golden
from yolo_compress.runtime.secure.signed_manifest import seal

pytest.importorskip("ai_edge_litert")

FAMILIES = ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"]
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")


def exported(folder: Path, yaml: str) -> dict[str, Path]:
    model = net(yaml=yaml)
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    to_fp16(folder / "fp32.onnx", folder / "fp16.onnx")
    state: QuantState = fold(ptq(model, lambda: [images(4)], "max"), model)
    for form in ("onnxruntime", "tensorrt10"):
        insert_qdq(folder / "fp32.onnx", folder / f"{form}.onnx", state, form)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module", params=FAMILIES)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("litert"), request.param)


@pytest.fixture(scope="module")
def yolov8(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("litert"), "yolov8n.yaml")


@pytest.fixture(scope="module")
def int8(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "litert-int8"
    LiteRtBackend.build(files["onnxruntime"], out, "int8")
    return out


def test_float_files_compute_what_their_onnx_file_computes(files: dict[str, Path], tmp_path: Path) -> None:
    batch = images(4, seed=3)
    for precision in ("fp32", "fp16"):
        LiteRtBackend.build(files[precision], tmp_path / precision, precision)
        with LiteRtBackend(tmp_path / precision, threads=1) as engine:
            got = np.concatenate([engine(image[None].numpy()) for image in batch])
            assert engine.executed.startswith("fp32") and engine.batch == 1
        apart = np.abs(got - run_onnx(in_float32(files[precision], tmp_path / f"{precision}.onnx"), batch))
        assert apart[:, :4].max() < 0.1 and apart[:, 4:].max() < 1e-3, "px and scores"
    sizes = [(tmp_path / precision / FILE).stat().st_size for precision in ("fp32", "fp16")]
    assert sizes[1] < 0.55 * sizes[0]


def test_int8_convolutions_have_the_values_and_scales_of_the_onnx_file(files: dict[str, Path], int8: Path) -> None:
    graph = onnx.load(str(files["onnxruntime"])).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    pairs = {node.input[0]: node.input[1:] for node in graph.node if node.op_type == "QuantizeLinear"}
    written = {one.outputs[0].name: one for one in read(int8 / FILE) if one.kind in CONVOLUTIONS}
    quantised = 0
    for node in (node for node in graph.node if node.op_type == "Conv"):
        found = written.pop(node.output[0])
        depthwise = found.kind == "DEPTHWISE_CONV_2D"
        weight = found.inputs[1]
        assert weight.values is not None
        OIHW = weight.values.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
        if node.input[1] not in made:
            assert np.array_equal(OIHW, stored[node.input[1]])
            continue
        codes, scale_O = (stored[name] for name in made[node.input[1]].input[:2])
        if found.outputs[0].kind != INT8:  # without an activation behind it, and float in the plan
            assert np.array_equal(np.rint(OIHW / scale_O.reshape(-1, 1, 1, 1)), codes)
            assert node.output[0] not in pairs
            continue
        quantised += 1
        assert np.array_equal(OIHW, codes) and weight.quantised is not None
        assert np.array_equal(weight.quantised.scale, scale_O) and weight.quantised.axis == (3 if depthwise else 0)
        for tensor in (found.inputs[0], found.outputs[0]):
            scale, zero = (stored[name] for name in pairs[re.sub("(_int8|_padded)$", "", tensor_origin(tensor, node))])
            assert tensor.quantised == Quantised(scale.reshape(1), int(zero) - 128)
        bias, about = found.inputs[2].values, found.inputs[2].quantised
        assert bias is not None and about is not None
        assert np.allclose(bias * about.scale, stored[node.input[2]], atol=float(about.scale.max()))
    assert not written and quantised == {63: 57, 87: 78, 102: 90}[sum(n.op_type == "Conv" for n in graph.node)]
    with LiteRtBackend(int8) as engine:
        assert engine.executed.startswith(f"int8 ({quantised} int8, ")


def tensor_origin(tensor: Tensor, node: Any) -> str:
    """Return the ONNX tensor that a tensor stands for. The padded input of a convolution has the name of its output."""
    return node.input[0].removesuffix("_DQ") if tensor.name.endswith(("_padded", "_int8")) else tensor.name


@pytest.mark.filterwarnings("ignore:Warning. Enabling `experimental_preserve_all_tensors`")
def test_every_int8_operator_computes_what_its_scales_say(int8: Path) -> None:
    """For the INT8 values that an operator read, its result is the exact one, rounded to the scale of its output."""
    from ai_edge_litert.interpreter import Interpreter

    engine = Interpreter(str(int8 / FILE), num_threads=1, experimental_preserve_all_tensors=True)
    engine.allocate_tensors()
    index = {one["name"]: one["index"] for one in engine.get_tensor_details()}
    engine.set_tensor(engine.get_input_details()[0]["index"], images(1, seed=9).permute(0, 2, 3, 1).numpy())
    engine.invoke()
    checked: dict[str, int] = {}
    for one in read(int8 / FILE):
        if one.kind not in EXACT or one.outputs[0].kind != INT8:
            continue
        values = [
            torch.tensor(
                number(tensor, tensor.values if tensor.values is not None else engine.get_tensor(index[tensor.name]))
            )
            for tensor in one.inputs
        ]
        about = one.outputs[0].quantised
        assert about is not None
        expected = np.rint(EXACT[one.kind](one, *values).numpy() / about.scale[0]) + about.zero_point
        got = engine.get_tensor(index[one.outputs[0].name]).astype(np.int64)
        apart = np.abs(got - expected.clip(-128, 127))
        assert apart.max() <= 1 and (apart > 0).mean() < 0.02, one.outputs[0].name
        checked[one.kind] = checked.get(one.kind, 0) + 1
    assert checked["CONV_2D"] > 50 and set(checked) >= {"ADD", "CONCATENATION", "LOGISTIC", "MAX_POOL_2D", "MUL"}


def number(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """Return the numbers that INT8 or INT32 values stand for; other values as they are."""
    about = tensor.quantised
    if about is None:
        return values.astype(np.float64) if values.dtype.kind == "f" else values
    shape = [1] * values.ndim
    shape[about.axis] = -1
    numbers: np.ndarray = (values.astype(np.float64) - about.zero_point) * about.scale.astype(np.float64).reshape(shape)
    return numbers


def _conv(one: Operator, x: Any, w: Any, b: Any) -> Any:
    depthwise = one.kind == "DEPTHWISE_CONV_2D"
    weight = w.permute(3, 0, 1, 2) if depthwise else w.permute(0, 3, 1, 2)
    size, side = x.shape[1], one.outputs[0].shape[1]
    stride = 2 if side <= size // 2 and size > 1 else 1
    pad = weight.shape[-1] // 2 if stride == 1 and side == size else 0
    return F.conv2d(x.permute(0, 3, 1, 2), weight, b, stride, pad, 1, x.shape[3] if depthwise else 1).permute(
        0, 2, 3, 1
    )


EXACT: dict[str, Any] = {
    "ADD": lambda one, x, y: x + y,
    "CONCATENATION": lambda one, *parts: torch.cat(parts, 3),
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _conv,
    "LOGISTIC": lambda one, x: x.sigmoid(),
    "MAX_POOL_2D": lambda one, x: F.max_pool2d(x.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1),
    "MUL": lambda one, x, y: x * y,
    "RESIZE_NEAREST_NEIGHBOR": lambda one, x, size: x.repeat_interleave(2, 1).repeat_interleave(2, 2),
}


def test_int8_images_have_the_scale_of_the_plan_and_give_the_same_boxes(
    yolov8: dict[str, Path], tmp_path: Path
) -> None:
    graph, image = onnx.load(str(yolov8["onnxruntime"])).graph, images(1, seed=2).numpy()
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images")
    scale, zero = float(stored[first.input[1]]), int(stored[first.input[2]])
    boxes = []
    for int8_images in (False, True):
        out = tmp_path / str(int8_images)
        LiteRtBackend.build(yolov8["onnxruntime"], out, "int8", int8_images=int8_images)
        with LiteRtBackend(out, threads=1) as engine:
            boxes.append(engine(image))
            assert engine.executed.endswith(", INT8 images") == int8_images
            taken = engine._engine.get_input_details()[0]
            assert taken["dtype"] == (np.int8 if int8_images else np.float32)
    assert np.array_equal(*boxes)
    assert taken["quantization"] == (pytest.approx(scale), zero - 128), "UINT8 in the ONNX file"
    given = engine_input(out, image)
    assert given.dtype == np.int8 and len(np.unique(given)) > 50
    assert np.abs((given.astype(np.float64) - (zero - 128)) * scale - image.transpose(0, 2, 3, 1)).max() <= 0.51 * scale


def engine_input(folder: Path, image_1CHW: np.ndarray) -> np.ndarray:
    """Return what the backend gives the library for an image."""
    with LiteRtBackend(folder, threads=1) as engine:
        engine(image_1CHW)
        given: np.ndarray = engine._engine.get_tensor(engine._input)
        return given


def test_a_bundle_builds_and_runs_int8_images(
    yolov8: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor, bundle = 0.0005, tmp_path / "bundle"
    for folder in ("onnx", "golden"):
        (bundle / folder).mkdir(parents=True)
    shutil.copy(yolov8["onnxruntime"], bundle / "onnx" / "int8-onnxruntime.onnx")
    picture = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    np.save(bundle / "golden" / "0.npy", picture)
    LiteRtBackend.build(yolov8["onnxruntime"], tmp_path / "float32", "int8")
    with LiteRtBackend(tmp_path / "float32") as engine:
        expected = golden.detections(engine, [picture], floor, 0.7)[0].tolist()
        about = {"executed": engine.executed, "library": engine.info.library, "onnx_sha256": engine.info.onnx_sha256}
    document = {
        "schema": golden.SCHEMA,
        "conf": 0.001,
        "floor": floor,
        "iou": 0.7,
        "images": [{"file": "0.npy", "name": "a"}],
        "engines": {"litert-int8": about},
        "expected": {"litert-int8": [expected]},
        "tolerances": {"int8": {"of": "worst", "box_px": 0, "score": 0, "unmatched": 0}},
    }
    (bundle / "golden" / "golden.json").write_text(json.dumps(document))
    onnx_files = {"int8-onnxruntime": "onnx/int8-onnxruntime.onnx"}
    seal(bundle, {"name": "a", "target": "plain", "names": NAMES, "imgsz": SIZE, "onnx": onnx_files}, 1, None)
    folder = bundle / "engines" / "litert-int8"
    # built anew when the images change
    for words, int8_images, again in (
        ([], False, True),
        (["--int8-images"], True, True),
        (["--int8-images"], True, False),
    ):
        assert build.main(["--runtime", "litert", "--precision", "int8", *words], bundle) == 0
        assert (json.loads(capsys.readouterr().out)["engines"][0]["seconds"] is not None) == again
        assert json.loads((folder / "build.json").read_text())["options"] == {"int8_images": int8_images}
    assert bench.main(["--golden", "--threads", "1"], bundle) == 0
    assert "int8" in capsys.readouterr().out and len(expected) > 10
    assert detect.main([str(bundle / "golden" / "0.npy"), "--conf", "0.001"], bundle) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])["detections"]
    assert len(found) == sum(row[4] > 0.001 for row in expected)


def test_a_bias_that_does_not_fit_silences_a_channel_without_effect_and_refuses_others() -> None:
    graph: Any = type("Graph", (), {"nodes": [], "constants": {}})()
    conversion = litert_convert.Conversion(graph, Path("int8.onnx"), False)
    conversion.pairs = {"x": Quantised(np.array([0.1], np.float32)), "y": Quantised(np.array([0.05], np.float32))}
    node = litert_convert.Node("Conv", "conv", ("x",), ("y",), {})
    codes, bias = np.full((2, 4, 1, 1), 63, np.int8), np.array([3.0, 3.0], np.float32)
    kept, scale_O = conversion.fitted(node, "x", codes, np.array([0.01, 1e-9], np.float32), bias)
    assert (kept[0] == 63).all() and not kept[1].any() and scale_O[0] == np.float32(0.01)
    assert np.abs(bias / (0.1 * scale_O.astype(np.float64))).max() < 2**31 - 1
    # a bias just within 32 bits leaves no room for the products that LiteRT adds to it
    near = np.array([1.0, 0.0], np.float32)
    _, scale_O = conversion.fitted(node, "x", codes, np.array([1.0 / (0.1 * (2**31 - 20_000)), 0.01], np.float32), near)
    assert near[0] / (0.1 * np.float64(scale_O[0])) + 255 * 63 * 4 < 2**31
    with pytest.raises(NotConverted, match="the bias of conv does not fit into 32 bits; leave this runtime out"):
        conversion.fitted(node, "x", codes, np.array([0.01, 1e-5], np.float32), bias * 1e5)


def test_its_sums_do_not_saturate() -> None:
    assert saturates("litert") is False


@pytest.mark.parametrize("simplify", [True, False])
def test_an_open_batch_becomes_one_image_and_a_fixed_one_stays(simplify: bool, tmp_path: Path) -> None:
    export_onnx(net(), tmp_path / "open.onnx", SIZE, names=NAMES, dynamic_batch=True, simplify=simplify)
    export_onnx(net(), tmp_path / "two.onnx", SIZE, names=NAMES, batch=2, simplify=simplify)
    batch = images(2, seed=8)
    for name, count in (("open", 1), ("two", 2)):
        LiteRtBackend.build(tmp_path / f"{name}.onnx", tmp_path / name, "fp32")
        with LiteRtBackend(tmp_path / name, threads=1) as engine:
            assert engine.batch == count
            got = engine(batch[:count].numpy())
        assert np.abs(got - run_onnx(tmp_path / f"{name}.onnx", batch[:count])).max() < 0.05


# what is refused


def test_files_that_litert_cannot_hold_are_refused(yolov8: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EngineError, match="have outputs that are not INT8 as in int8-onnxruntime.onnx"):
        LiteRtBackend.build(yolov8["tensorrt10"], out, "int8")
    with pytest.raises(EngineError, match="int8 requested, but the graph has no Q/DQ nodes"):
        LiteRtBackend.build(yolov8["fp32"], out, "int8")
    with pytest.raises(EngineError, match="its images are not INT8"):
        convert(yolov8["fp32"], tmp_path / "x.tflite", SIZE, "fp32", int8_images=True)
    model = onnx.load(str(yolov8["fp32"]))
    next(node for node in model.graph.node if node.op_type == "Exp").op_type = "Tanh"
    onnx.save(model, str(tmp_path / "odd.onnx"))
    with pytest.raises(NotConverted, match="is a Tanh, which this package does not convert to LiteRT"):
        LiteRtBackend.build(tmp_path / "odd.onnx", out, "fp32")
    model = onnx.load(str(yolov8["fp32"]))
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    mode = next(one for one in resize.attribute if one.name == "coordinate_transformation_mode")
    mode.s = b"half_pixel"
    onnx.save(model, str(tmp_path / "shifted.onnx"))
    with pytest.raises(NotConverted, match="is a Resize of another kind, which this package does not convert"):
        LiteRtBackend.build(tmp_path / "shifted.onnx", out, "fp32")
    with pytest.raises(EngineError, match="LiteRT opens only an engine directory"):
        LiteRtBackend(yolov8["fp32"])


def test_altered_and_damaged_files_are_refused(yolov8: dict[str, Path], tmp_path: Path) -> None:
    LiteRtBackend.build(yolov8["fp32"], tmp_path / "engine", "fp32")
    file = tmp_path / "engine" / FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EngineError, match="sha256 is not the one in engine.json"):
        LiteRtBackend(tmp_path / "engine")
    for damaged in (b"", b"\0\0\0\0TFL3", content[:1000], b"x" * 64):
        file.write_bytes(damaged)
        with pytest.raises(EngineError, match="not a LiteRT file"):
            read(file)


@pytest.mark.parametrize("package", ["ai_edge_litert", "onnx"])
def test_a_package_that_is_missing_is_named(
    package: str, yolov8: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LiteRtBackend.probe() is None
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    words = "(ai-edge-litert|onnx) does not import.*pip install ai-edge-litert onnx"
    with pytest.raises(RuntimeUnavailable, match=words):
        LiteRtBackend.build(yolov8["fp32"], tmp_path / "out", "fp32")
    assert re.search(words, str(LiteRtBackend.probe()))
