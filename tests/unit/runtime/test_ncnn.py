"""NCNN: pnnx's graph computes what the ONNX file computes, and its INT8 convolutions have the scales and values of the plan."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, net, run_onnx
from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.recipe.recipe import load
from yolo_compress.runtime.backends import ncnn_convert
from yolo_compress.runtime.backends.ncnn import BIN_FILE, PARAM_FILE, NcnnBackend
from yolo_compress.runtime.backends.ncnn_convert import CONVOLUTIONS, INT8_SCALES, OUTPUTS, WEIGHTS, read_param
from yolo_compress.runtime.errors import EngineError, RuntimeUnavailable
from yolo_compress.stages import engine

pytest.importorskip("ncnn")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("ncnn"), net()
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    state: QuantState = fold(ptq(model, lambda: [images(4)], "max"), model)
    for target in ("tensorrt10", "openvino"):
        insert_qdq(folder / "fp32.onnx", folder / f"{target}.onnx", state, target)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def int8(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "ncnn-int8"
    NcnnBackend.build(files["tensorrt10"], out, "int8")
    return out


def stored(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray | None, float | None]]:
    """Return convolution -> float weights, weight scales and input scale in NCNN's files, read as NCNN reads them."""
    content, at, found = (folder / BIN_FILE).read_bytes(), 0, {}

    def take(count: int) -> np.ndarray:
        nonlocal at
        at += 4 * count
        return np.frombuffer(content[at - 4 * count : at], "<f4")

    for layer in read_param(folder / PARAM_FILE):
        if layer.kind == "MemoryData":
            take(int(np.prod([int(layer.keys[axis]) for axis in (0, 1, 2) if axis in layer.keys])))
        if layer.kind in CONVOLUTIONS:
            take(1)
            weights, _ = take(int(layer.keys[WEIGHTS])), take(int(layer.keys[OUTPUTS]))
            scaled = INT8_SCALES in layer.keys
            both = (take(int(layer.keys[OUTPUTS])), float(take(1)[0])) if scaled else (None, None)
            found[layer.name] = (weights, *both)
    assert at == len(content)
    return found


def test_int8_convolutions_have_the_values_and_scales_of_the_onnx_file(files: dict[str, Path], int8: Path) -> None:
    graph = onnx.load(str(files["tensorrt10"])).graph
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    found, quantised = stored(int8), 0
    assert set(found) == {node.name for node in graph.node if node.op_type == "Conv"}, "the names are back"
    for node in (node for node in graph.node if node.op_type == "Conv"):
        weights, weight_scale_O, input_scale = found[node.name]
        if node.input[1] not in made:
            assert weight_scale_O is None and np.array_equal(weights, values[node.input[1]].ravel())
            continue
        quantised += 1
        codes, scale_O = (values[name] for name in made[node.input[1]].input[:2])
        assert weight_scale_O is not None and np.allclose(weight_scale_O, 1 / scale_O, rtol=1e-6)
        again = np.rint(weights.reshape(len(scale_O), -1) * weight_scale_O[:, None]).reshape(codes.shape)
        assert np.array_equal(again, codes), "NCNN quantises the weights to these values when it loads them"
        assert input_scale == pytest.approx(1 / float(values[made[node.input[0]].input[1]]), rel=1e-6)
    assert quantised == 57
    with NcnnBackend(int8) as opened:
        assert opened.executed == f"int8 (57 int8, {len(found) - 57} fp32; of {len(found)} convolutions)"


def test_int8_computes_what_the_graph_computes_with_only_its_convolutions_quantised(
    files: dict[str, Path], int8: Path, tmp_path: Path
) -> None:
    """NCNN quantises the inputs of convolutions alone; all else reads float tensors."""
    model = onnx.load(str(files["tensorrt10"]))
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            origin = made.get(name)
            if node.op_type not in ("Conv", "DequantizeLinear") and origin and origin.op_type == "DequantizeLinear":
                while origin is not None and origin.op_type == "DequantizeLinear":
                    name = made[origin.input[0]].input[0]
                    origin = made.get(name)
                node.input[index] = name
    onnx.save(model, str(tmp_path / "convolutions.onnx"))
    batch = images(16, seed=3)
    with NcnnBackend(int8, threads=1) as opened:
        got = np.concatenate([opened(image[None].numpy()) for image in batch])
    expected = run_onnx(tmp_path / "convolutions.onnx", batch)
    assert_equal_but_for_ties(got, expected, run_onnx(files["fp32"], batch))


def test_layers_are_timed_under_the_names_of_the_onnx_file(int8: Path) -> None:
    with NcnnBackend(int8) as opened:
        times = opened.node_ms(2)
    assert times.keys() >= stored(int8).keys() and all(ms > 0 for ms in times.values())
    assert "/model.0/conv/Conv+Swish" in times, "the activation counts for its convolution"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_open_batch_becomes_one_image(precision: str, tmp_path: Path) -> None:
    export_onnx(net(), tmp_path / "open.onnx", SIZE, names=NAMES, dynamic_batch=True)
    NcnnBackend.build(tmp_path / "open.onnx", tmp_path / "engine", precision)
    with NcnnBackend(tmp_path / "engine") as opened:
        assert opened.batch == 1 and opened.precision == precision


# what is refused


def test_graphs_that_ncnn_cannot_hold_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has a zero point; NCNN takes symmetric INT8"):
        NcnnBackend.build(files["openvino"], tmp_path / "out", "int8")
    export_onnx(net(), tmp_path / "four.onnx", SIZE, names=NAMES, batch=4)
    with pytest.raises(EngineError, match="images takes 4 images, and NCNN one at a time"):
        NcnnBackend.build(tmp_path / "four.onnx", tmp_path / "out", "fp32")
    with pytest.raises(EngineError, match="opens only an engine directory"):
        NcnnBackend(files["fp32"])
    assert not (tmp_path / "out").exists()


def test_a_graph_that_pnnx_changed_is_refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ncnn_convert._run_pnnx

    def other_weights(folder: Path, shape: Any) -> None:
        original(folder, shape)
        content = bytearray((folder / "model.ncnn.bin").read_bytes())
        content[5] ^= 1
        (folder / "model.ncnn.bin").write_bytes(content)

    def longer(folder: Path, shape: Any) -> None:
        original(folder, shape)
        with (folder / "model.ncnn.bin").open("ab") as end:
            end.write(b"\0" * 8)

    def without_a_layer(folder: Path, shape: Any) -> None:
        original(folder, shape)
        lines = (folder / "model.ncnn.param").read_text().splitlines()
        del lines[max(i for i, line in enumerate(lines) if line.startswith("Convolution"))]
        (folder / "model.ncnn.param").write_text("\n".join(lines) + "\n")

    for harm, words in (
        (other_weights, "pnnx changed the weights"),
        (longer, "8 bytes of weights are left over"),
        (without_a_layer, "pnnx changed"),
    ):
        monkeypatch.setattr(ncnn_convert, "_run_pnnx", harm)
        with pytest.raises(EngineError, match=words):
            NcnnBackend.build(files["tensorrt10"], tmp_path / "out", "int8")


@pytest.mark.parametrize("package", ["pnnx", "onnx", "ncnn"])
def test_a_package_that_is_missing_is_named_before_any_stage(
    package: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NcnnBackend.probe() is None
    monkeypatch.setitem(sys.modules, package, None)
    words = f"{package} (does not import|is not installed).*pip install ncnn pnnx onnx"
    with pytest.raises(RuntimeUnavailable, match=words):
        NcnnBackend.build(files["fp32"], tmp_path / "out", "fp32")
    assert re.search(words, str(NcnnBackend.probe()))


def test_a_robot_without_torch_converts(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python package pnnx imports torch; only its program is used."""
    monkeypatch.delitem(sys.modules, "pnnx", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    NcnnBackend.build(files["fp32"], tmp_path / "out", "fp32")
    assert "pnnx" not in sys.modules


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    for content in ("", "7767516\n1 1\n", "7767517\n1 1\nConvolution a x 1\n", "7767517\n1 1\nConvolution\n"):
        (tmp_path / "a.param").write_text(content)
        with pytest.raises(EngineError, match="not a graph of NCNN"):
            read_param(tmp_path / "a.param")


def test_several_images_are_refused_before_any_stage() -> None:
    nothing: Any = None
    with pytest.raises(RecipeError, match=r"ncnn takes 1 image in an inference, export\.batch is 4"):
        engine.check(load("digits", [("export.batch", "4"), ("engine.runtimes", "ncnn")]), nothing)
    engine.check(load("digits", [("export.batch", "4")]), nothing)  # auto leaves NCNN out, with the reason
    made = load("digits", [("export.batch", "4")])
    assert made.engine and engine._missing(made.engine, made.export)["ncnn"]
