"""CoreML: the ML program that is written, read back from its files, has the layers, INT8 values and scales of the plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.support import ml_program
from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, in_float32, net, run_onnx
from yolo_compress.errors import RecipeError
from yolo_compress.export.coreml import write_package
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.runtime.backends import coreml_convert
from yolo_compress.runtime.backends.coreml_convert import census, named
from yolo_compress.runtime.backends.litert import LiteRtBackend
from yolo_compress.runtime.errors import EngineError, RuntimeUnavailable

pytest.importorskip("coremltools")
pytest.importorskip("ai_edge_litert")
pytestmark = pytest.mark.filterwarnings("ignore")  # of coremltools, about the versions of torch and scikit-learn

FILES = {"fp16": "fp16", "int8": "int8-tensorrt11"}


def exported(folder: Path, yaml: str, share: float = 1.0) -> dict[str, Path]:
    """Write the ONNX files of a detector, and return them by their stem. `share` of its FLOPs remain."""
    model = net(yaml=yaml)
    if share < 1:
        groups, shapes = prunable(model), conv_shapes(model, SIZE)
        scores = {group.name: torch.arange(group.width).float() for group in groups}
        prune(model, choose(model, groups, scores, keep_flops(shapes, share), 1, shapes).keep)
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    export_onnx(model, folder / "opset19.onnx", SIZE, names=NAMES, opset=19)
    to_fp16(folder / "fp32.onnx", folder / "fp16.onnx")
    state: QuantState = fold(ptq(model, lambda: [images(4)], "max"), model)
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", state, "tensorrt10")
    insert_qdq(folder / "fp32.onnx", folder / "openvino.onnx", state, "openvino")
    insert_qdq(folder / "fp32.onnx", folder / "int8-onnxruntime.onnx", state, "onnxruntime")
    insert_qdq(folder / "opset19.onnx", folder / "codes.onnx", state, "tensorrt11")
    to_fp16(folder / "codes.onnx", folder / "int8-tensorrt11.onnx", "int8")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module", params=["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("onnx"), request.param)


@pytest.fixture(scope="module")
def yolov8(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return exported(tmp_path_factory.mktemp("onnx"), "yolov8n.yaml")


@pytest.mark.slow
def test_int8_package_has_the_scales_and_values_of_the_onnx_file_one_to_one(
    files: dict[str, Path], tmp_path: Path
) -> None:
    source, package = files["int8-tensorrt11"], tmp_path / "int8.mlpackage"
    write_package(source, package, "int8")
    spec, _ = ml_program.load(package)
    found = census(spec, package / "Data" / "com.apple.CoreML" / "weights")
    graph = onnx.load(str(source)).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    scales, weights = {}, 0
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in stored:
            scales[named(node.output[0])] = float(stored[node.input[1]])
        if node.op_type == "Conv" and node.input[1] in made:
            codes, scale_O = (stored[name] for name in made[node.input[1]].input[:2])
            got = found.weights[named(node.output[0])]
            assert np.array_equal(got.values, codes) and np.array_equal(got.scale_O, scale_O.astype(np.float32))
            weights += 1
    kinds = [node.op_type for node in graph.node]
    assert found.scales == scales and len(found.weights) == weights == found.layers["constexpr_affine_dequantize"] > 50
    assert found.layers["conv"] == kinds.count("Conv")
    assert found.layers["quantize"] == found.layers["dequantize"] == kinds.count("QuantizeLinear")
    assert spec.specificationVersion == 8, "iOS 17"


@pytest.mark.slow
def test_packages_compute_what_their_onnx_file_computes(files: dict[str, Path], tmp_path: Path) -> None:
    """The float16 types of a file are replaced by float32 on both sides, since rounding to float16 differs by processor."""
    batch = images(8, seed=3)
    got, expected = {}, {}
    for precision, stem in {**FILES, "fp32": "fp32"}.items():
        package = tmp_path / f"{precision}.mlpackage"
        write_package(files[stem], package, precision)
        program = ml_program.load(package)[1]
        got[precision] = np.concatenate([ml_program.run(program, image[None])[0] for image in batch])
        expected[precision] = run_onnx(in_float32(files[stem], tmp_path / f"{precision}.onnx"), batch)
    for precision in ("fp32", "fp16"):
        assert np.abs(got[precision] - expected[precision])[:, :4].max() < 0.1, "px"
        assert np.abs(got[precision] - expected[precision])[:, 4:].max() < 1e-3
    assert_equal_but_for_ties(got["int8"], expected["int8"], expected["fp32"])


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "share"), [("yolov8n.yaml", 0.6), ("yolov8s.yaml", 1.0), ("yolov8s.yaml", 0.6)])
def test_pruned_and_larger_models_are_converted(yaml: str, share: float, tmp_path: Path) -> None:
    """`write_package` itself refuses a package whose layers, scales or INT8 weights are not those of the file."""
    found = exported(tmp_path, yaml, share)
    for precision, stem in FILES.items():
        write_package(found[stem], tmp_path / f"{precision}.mlpackage", precision)
        assert (tmp_path / f"{precision}.mlpackage" / "Manifest.json").is_file()
    LiteRtBackend.build(found["int8-onnxruntime"], tmp_path / "litert", "int8")


def test_equal_files_give_equal_packages(yolov8: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_package(yolov8["fp16"], tmp_path / name, "fp16")
    for file in (tmp_path / "one").rglob("*"):
        twin = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.is_dir() or file.read_bytes() == twin.read_bytes()


def test_a_package_with_nms_takes_pixels_and_gives_fractions_of_the_image(
    yolov8: dict[str, Path], tmp_path: Path
) -> None:
    write_package(yolov8["fp32"], tmp_path / "nms.mlpackage", "fp32", nms=True)
    spec, program = ml_program.load(tmp_path / "nms.mlpackage")
    pixels = torch.randint(0, 256, (1, 3, *SIZE), generator=torch.Generator().manual_seed(5)).float()
    confidence, coordinates = ml_program.run(program, pixels)
    expected = run_onnx(yolov8["fp32"], pixels / 255)[0]
    assert np.allclose(confidence, expected[4:].T, atol=1e-4)
    assert np.allclose(coordinates * SIZE[0], expected[:4].T, atol=0.1)
    suppression = spec.pipeline.models[1].nonMaximumSuppression
    assert (suppression.iouThreshold, suppression.confidenceThreshold) == (0.7, 0.25)
    assert list(suppression.stringClassLabels.vector) == list(NAMES)
    assert spec.description.input[0].type.imageType.width == SIZE[1]
    assert [one.name for one in spec.description.output] == ["confidence", "coordinates"]


def test_an_open_batch_becomes_one_image(tmp_path: Path) -> None:
    export_onnx(net(), tmp_path / "open.onnx", SIZE, names=NAMES, dynamic_batch=True, simplify=False)
    write_package(tmp_path / "open.onnx", tmp_path / "open.mlpackage", "fp32")
    spec, _ = ml_program.load(tmp_path / "open.mlpackage")
    assert list(spec.description.input[0].type.multiArrayType.shape) == [1, 3, *SIZE]


# what is refused


def test_files_that_coreml_cannot_hold_are_refused(yolov8: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.mlpackage"
    with pytest.raises(EngineError, match="has a zero point; CoreML is built from int8-tensorrt11.onnx"):
        write_package(yolov8["openvino"], out, "int8")
    with pytest.raises(EngineError, match="int8 requested, but the graph has no Q/DQ nodes"):
        write_package(yolov8["fp32"], out, "int8")
    model = onnx.load(str(yolov8["fp32"]))
    for kind, change, words in (
        (
            "Exp",
            lambda node: setattr(node, "op_type", "Tanh"),
            "is a Tanh, which this package does not convert to CoreML",
        ),
        ("MaxPool", lambda node: setattr(node.attribute[0], "i", 1), "is a MaxPool of another kind"),
    ):
        odd = onnx.ModelProto.FromString(model.SerializeToString())
        node = next(node for node in odd.graph.node if node.op_type == kind)
        node.attribute.sort(key=lambda one: one.name != "ceil_mode")
        change(node)
        onnx.save(odd, str(tmp_path / "odd.onnx"))
        with pytest.raises(EngineError, match=words):
            write_package(tmp_path / "odd.onnx", out, "fp32")
    assert not out.exists()


def test_nms_for_boxes_that_need_none_is_refused(tmp_path: Path) -> None:
    export_onnx(net(yaml="yolo26n.yaml"), tmp_path / "fp32.onnx", SIZE, names=NAMES)
    with pytest.raises(RecipeError, match=r"need no NMS \(YOLO26\); set export.nms=false"):
        write_package(tmp_path / "fp32.onnx", tmp_path / "out.mlpackage", "fp32", nms=True)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda made: made._replace(layers={**made.layers, "silu": 1}), "1 silu, expected 57"),
        (lambda made: made._replace(scales=dict.fromkeys(made.scales, 0.5)), "other scales"),
        (
            lambda made: made._replace(
                weights={key: one._replace(values=-one.values) for key, one in made.weights.items()}
            ),
            "other INT8 weights",
        ),
    ],
)
def test_a_program_that_coremltools_changed_is_refused(
    harm: Callable[[Any], Any], words: str, yolov8: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml_convert, "census", lambda *where: harm(census(*where)))
    with pytest.raises(EngineError, match=f"wrote another model: {words}; not used"):
        write_package(yolov8["int8-tensorrt11"], tmp_path / "out.mlpackage", "int8")


@pytest.mark.parametrize("package", ["coremltools", "onnx"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeUnavailable, match=f"{package} does not import.*pip install coremltools onnx"):
        coreml_convert.require()
