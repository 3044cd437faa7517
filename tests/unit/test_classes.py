"""What must not depend on the number of classes, on their names, on the colours or on the number of images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from tests.support import quant_net, report_case
from tests.support.lint_graphs import Net
from yolo_compress.bundle import make
from yolo_compress.bundle.io_contract import check_signatures
from yolo_compress.bundle.network_io import read
from yolo_compress.bundle.targets import deepstream
from yolo_compress.data.data_yaml import read_yaml
from yolo_compress.distill.logits import soft_labels
from yolo_compress.errors import CompressError, DataError, GateFailed, NumericsError
from yolo_compress.evaluate.ab.comparison import compare
from yolo_compress.evaluate.coco import absolute_boxes, mean_ap
from yolo_compress.evaluate.tide import errors
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.nms import with_nms
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.lint.check import check
from yolo_compress.lint.load import read as read_graph
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.ranges import fold
from yolo_compress.report import as_text, html
from yolo_compress.report.charts import gallery
from yolo_compress.runtime.backends.base import check_output, describe_onnx
from yolo_compress.runtime.backends.ort import OrtBackend
from yolo_compress.runtime.detect import pre
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.post import nms
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.measure.latency import _inputs
from yolo_compress.stages import _calibration_images, export
from yolo_compress.train import checkpoint
from yolo_compress.train.trainer import settle

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (64, 64)


def names(classes: int) -> list[str]:
    return [f"class {k}" for k in range(classes)]


def trained(classes: int, channels: int = 3) -> DetectionModel:
    """As `quant_net.net`, of any number of classes and image channels."""
    model = checkpoint.new_model("yolov8n.yaml", names(classes), channels, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(noise(8, channels))
        for branch in model.model[-1].cv3:
            branch[-1].bias.normal_(std=2.0)
    return model.eval()


def noise(count: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, *SIZE, generator=torch.Generator().manual_seed(1))


# --- lint: DFL is what it computes, not how many channels it has ------------------------------------------------------


def with_tail(kind: str, weights: list[float] | None = None) -> Net:
    """An INT8 convolution, a float output convolution of 16 channels behind it, and what reads that."""
    net = Net()
    out = net.conv(net.int8_conv(net.pair(net.stem()), "hidden"), "out", out=16)
    bins_N = np.arange(16, dtype=np.float32) if weights is None else np.array(weights, np.float32)
    if kind == "matmul":
        turned = net.op("Transpose", [net.op("Softmax", [out], "softmax", axis=1)], "turned", perm=[0, 2, 3, 1])
        return net.ends(net.op("MatMul", [turned, net.constant("bins", bins_N[:, None])], "last"))
    if kind == "class":
        return net.ends(net.conv(out, "last", into=16, out=1))
    softmax = net.op("Softmax", [out], "softmax", axis=1)
    if kind == "codes":
        net.constant("codes", np.rint(bins_N / 15 * 127).reshape(1, 16, 1, 1), np.int8)
        net.constant("codes_scale", np.float32(15 / 127))
        net.constant("codes_zero", 0, np.int8)
        weight = net.op("DequantizeLinear", ["codes", "codes_scale", "codes_zero"], "bins")
        softmax = net.pair(softmax)
    else:
        weight = net.constant("bins", bins_N.reshape(1, 16, 1, 1))
    return net.ends(net.conv(softmax, "last", weight=weight))


@pytest.mark.parametrize(
    ("kind", "weights", "expected"),
    [
        ("conv", None, True),
        ("matmul", None, True),
        ("codes", None, True),
        ("class", None, False),
        ("conv", [*range(15), 14], False),  # learnt weights behind a softmax
        ("conv", [3.0] * 16, False),
    ],
)
def test_dfl_is_a_softmax_and_weights_that_count(
    kind: str, weights: list[float] | None, expected: bool, tmp_path: Path
) -> None:
    graph = read_graph(with_tail(kind, weights).save(tmp_path / "net.onnx"))
    last = next(node for node in graph.nodes if node.name == "last")
    assert graph.is_dfl(last) == expected
    assert ("out" in graph.before_layers) != expected, "a layer follows, or the tail begins"


def test_an_output_convolution_of_one_class_is_one(tmp_path: Path) -> None:
    """In float it is right, and what it reads is no output; in INT8 it is the one that is named."""
    float_one, int8_one = Net(), Net()
    hidden = float_one.int8_conv(float_one.pair(float_one.stem()), "hidden")
    float_one.ends(float_one.conv(hidden, "class", out=1))
    hidden = int8_one.int8_conv(int8_one.pair(int8_one.stem()), "hidden")
    int8_one.ends(int8_one.int8_conv(int8_one.pair(hidden), "class", out=1))
    found = [
        [finding.node for finding in check(net.save(tmp_path / "net.onnx"), "tensorrt-10.3").findings
         if finding.rule == "head-int8"]
        for net in (float_one, int8_one)
    ]  # fmt: skip
    assert found == [[], ["class"]]


@pytest.mark.fault(73)
def test_export_says_what_would_be_faster_and_refuses_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YOLOv8n of 100 classes and more has class branches of 100 channels: no fault of the file."""
    net = Net()
    net.head(net.int8_conv(net.pair(net.int8_conv(net.pair(net.stem()), "narrow", out=20)), "second", into=20))
    report = export._lint(net.save(tmp_path / "narrow.onnx"), "tensorrt-10.3", True)
    assert report.rules["channels-8"] == 2
    export._advise(report, "original")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: original: lint channels-8 (2): ") and "prune.round_to" in line

    net = Net()
    left, right = net.stem(), net.op("Relu", ["feature"], "other")
    net.head(net.int8_conv(net.pair(net.op("Concat", [left, right], "concat", axis=1)), "second", into=64))
    net.save(tmp_path / "float.onnx")
    with pytest.raises(CompressError, match="concat-float"):
        export._lint(tmp_path / "float.onnx", "tensorrt-10.3", True)
    export._lint(tmp_path / "float.onnx", "tensorrt-10.3", False)


@pytest.mark.fault(35)
@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 60, 300])
def test_export_lint_engine_and_nms(classes: int, tmp_path: Path) -> None:
    """60: as many rows as DFL has channels; 300: more rows than anchors, and class branches of 100 channels."""
    model, images = trained(classes), noise(2)
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=names(classes))
    state = fold(ptq(model, lambda: [images], "max"), model)
    for runtime, target in (("tensorrt10", "tensorrt-10.3"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")):
        file = tmp_path / f"int8-{runtime}.onnx"
        insert_qdq(tmp_path / "fp32.onnx", file, state, runtime)
        report = check(file, target)
        assert report.facts["int8_convs"] == 57
        advice = {rule for rule in report.rules if rule.startswith("channels-")}
        assert set(report.rules) == advice and ("channels-8" in advice) == (classes == 300)
    with torch.no_grad():
        expected = model(images[:1])[0].numpy()
    assert expected.shape == (1, 4 + classes, 84)
    for precision, source, atol in (("fp32", "fp32.onnx", 1e-3), ("int8", "int8-onnxruntime.onnx", None)):
        BACKENDS["onnxruntime"].build(tmp_path / source, tmp_path / precision, precision)
        with open_engine(tmp_path / precision, threads=1) as engine:
            output = engine(images[:1].numpy())
        assert output.shape == expected.shape and np.isfinite(output).all()
        if atol is not None:
            assert np.allclose(output, expected, atol=atol)
    with_nms(tmp_path / "fp32.onnx", tmp_path / "nms.onnx")
    (found,) = quant_net.run_onnx(tmp_path / "nms.onnx", images[:1])
    kept, wanted = found[found[:, 4] > 0], nms(expected[0], conf=0.25, multi_label=False)
    assert found.shape == (300, 6) and len(kept) == len(wanted) > 0
    for rows in (kept, wanted):  # scores near 1 tie, so the order of equals is free
        rows[:] = rows[np.lexsort(rows[:, :4].T.round(1))]
    assert np.allclose(kept, wanted, atol=1e-2) and kept[:, 5].max() < classes


# --- output: rows are boxes and classes, however many anchors there are -----------------------------------------------


@pytest.mark.parametrize(("classes", "anchors"), [(1, 21), (17, 21), (300, 21)])
def test_more_rows_than_anchors_is_not_a_transposed_output(classes: int, anchors: int, tmp_path: Path) -> None:
    output = np.zeros((4 + classes, anchors), np.float32)
    output[:4, 5] = 30, 20, 10, 4
    output[4 + classes - 1, 5] = 0.75
    assert nms(output).tolist() == [[25, 18, 35, 22, 0.75, classes - 1]]
    onnx_file = tmp_path / "x.onnx"
    onnx_file.write_bytes(b"")
    info = describe_onnx(onnx_file, "onnxruntime", "fp32", "1", names(classes), (32, 32))
    check_output(info, [1, 4 + classes, anchors], tmp_path)
    if classes + 4 != anchors:
        with pytest.raises(EngineError, match=f"anchors. for {classes} classes"):
            check_output(info, [1, anchors, 4 + classes], tmp_path)


def test_soft_labels_of_one_class_pull_as_those_of_many() -> None:
    """Classes are Bernoulli each: a single one is no softmax over one bin, which would be 1 whatever the logit."""
    student, teacher = torch.tensor([[[0.0]]], requires_grad=True), torch.tensor([[[2.0]]])
    loss = soft_labels(student, teacher, torch.ones(1, 1), temperature=2.0)
    loss.backward()
    p = 1 / (1 + np.exp(-1.0))  # sigmoid(2 / T)
    assert float(loss.detach()) == pytest.approx(4 * (p * np.log(p / 0.5) + (1 - p) * np.log((1 - p) / 0.5)), rel=1e-5)
    assert float(student.grad) == pytest.approx(2.0 * (0.5 - p), rel=1e-5)  # type: ignore[arg-type]
    twice = soft_labels(student.expand(1, 2, 1), teacher.expand(1, 2, 1), torch.ones(1, 1), temperature=2.0)
    assert float(twice.detach()) == pytest.approx(2 * float(loss.detach()), rel=1e-5)


# --- figures that are 0, perfect or undefined -------------------------------------------------------------------------


def truth(*boxes: tuple[int, float, float, float, float]) -> Any:
    return SimpleNamespace(width=64, height=64, boxes=boxes)


BOX = (0, 0.5, 0.5, 0.5, 0.5)
NOTHING, FOUND = np.zeros((0, 6), np.float32), np.array([[16, 16, 48, 48, 0.9, 0]], np.float32)


@pytest.mark.fault(66)
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(NOTHING, NOTHING, (0, 0)), (FOUND, FOUND, (1, 1)), (NOTHING, FOUND, (0, 1)), (FOUND, NOTHING, (1, 0))],
)
def test_one_box_in_all_of_val(a: np.ndarray, b: np.ndarray, expected: tuple[int, int]) -> None:
    """One image with one object of the first class of three, and one without: nothing is divided by 0 (warnings are errors)."""
    truths, none = [truth(BOX), truth()], NOTHING
    boxes = [absolute_boxes(one) for one in truths]
    found = compare(
        boxes, [a, none], [b, none], names(3), margin=0.01, conf=0.25, replicates=20, seed=0, about_a={}, about_b={}
    )
    assert [round(found["map50_95"][key], 9) for key in "ab"] == list(expected)
    assert [part["a"] is None for part in found["by_class"]] == [False, True, True]
    assert (
        found["verdict"]["status"] == "inconclusive"
        and "; 1 image with objects, an interval needs at least 10" in found["verdict"]["line"]
    )
    for rows, value in ((a, expected[0]), (b, expected[1])):
        mean = mean_ap(truths, [rows, none], names(3))
        assert mean["map50_95"] == pytest.approx(value) and mean["per_class"]["class 1"] is None
        types = {row["name"]: row for row in errors(boxes, [rows, none])["types"]}
        assert (types["missed"]["count"], types["missed"]["cost"]) == (1 - value, 0.0), "without its only truth AP is 0"


ODD = (
    'it\'s "a" <script>alert(1)</script>', "ünïcode 箱 \u202eRTL", "x" * 300, r"$\frac{1$", "a|b `c` [d](e)", "&amp; <b>", "#0a0b0c; }"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("classes", [("bin",), ODD, tuple(names(300))], ids=["one", "odd", "300"])
def test_report_of_any_classes(classes: tuple[str, ...]) -> None:
    truths = [truth((k, 0.5, 0.5, 0.5, 0.5)) for k in range(len(classes))]
    boxes = [absolute_boxes(one) for one in truths]
    a = [np.array([[16, 16, 48, 48, 0.9, k]], np.float32) for k in range(len(classes))]
    ab = compare(boxes, a, [NOTHING, *a[1:]], classes, margin=0.01, conf=0.25, replicates=20, seed=0, about_a={}, about_b={},
                 image_set=report_case.IMAGES)  # fmt: skip
    data = {
        "yaml": "x.yaml",
        "val_images": len(truths),
        "names": list(classes),
        "notes": [f"val: no box of {classes[-1]}"],
    }
    document = report_case.document(ab=ab, data=data)
    item = report_case.item(names=classes, truths=[(len(classes) - 1, 0.5, 0.5, 0.25, 0.5)])
    page, text = html.render(document, gallery.draw([item])), as_text.render_markdown(document)
    assert "<script" not in page and "<script" not in text
    rows = [line for line in text.split("## By class")[1].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(classes), "a line a class, whatever is in its name"
    assert page.count("<tr") >= len(classes)
    assert len(page) < 1_000_000


# --- names ------------------------------------------------------------------------------------------------------------


def data_yaml(folder: Path, names: str) -> Path:
    for split in ("train", "val"):
        (folder / split).mkdir(exist_ok=True)
    file = folder / "data.yaml"
    file.write_text(f"train: train\nval: val\nnames: {names}\n", encoding="utf-8")
    return file


@pytest.mark.fault(79)
@pytest.mark.parametrize("name", ["a\\nb", "bell\\a", "esc\\e[31m", "line\\u2028b", "next\\x85b"])
def test_class_names_that_no_list_can_hold_are_refused_before_anything_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.yaml:3: class name .* contains a line break or another control character"
    ):
        read_yaml(data_yaml(tmp_path, f'["{name}", b]'))


def test_blank_class_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class name '  ' is not text"):
        read_yaml(data_yaml(tmp_path, '["  ", b]'))


def test_odd_class_names_are_taken_as_they_are(tmp_path: Path) -> None:
    import yaml

    assert read_yaml(data_yaml(tmp_path, yaml.safe_dump(list(ODD), default_flow_style=True, width=10_000))).names == ODD


# --- grey images (`channels: 1`) --------------------------------------------------------------------------------------


def test_grey_is_the_brightness_with_opencv_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    exact = image @ np.array([0.299, 0.587, 0.114])
    same = np.repeat(image[..., :1], 3, axis=2)
    for step in ("opencv", "numpy"):
        if step == "numpy":
            monkeypatch.setattr(pre, "_cv2", lambda: None)
        found = pre.grey(image)
        assert found.shape == (48, 40, 1) and found.dtype == np.uint8
        assert np.abs(found[..., 0] - exact).max() < 0.51, step
        assert np.array_equal(pre.grey(same), same[..., :1]), "grey stays as it is"


def test_letterbox_of_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the three equal planes of a grey image have it, with OpenCV and without."""
    grey_HW1 = np.random.default_rng(0).integers(0, 256, (30, 100, 1), np.uint8)
    image = np.repeat(grey_HW1, 3, axis=2)
    for step in ("opencv", "numpy"):
        if step == "numpy":
            monkeypatch.setattr(pre, "_cv2", lambda: None)
        colour, placed = pre.letterbox(image, SIZE)
        found, same = pre.letterbox(image, SIZE, channels=1)
        assert found.shape == (1, *SIZE) and same == placed and np.array_equal(found[0], colour[0]), step


@pytest.mark.fault(35, 78)
def test_a_grey_network_runs_everywhere_on_rgb_images(tmp_path: Path) -> None:
    model = trained(2, channels=1)
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=names(2))
    image = np.random.default_rng(0).integers(0, 256, (50, 64, 3), np.uint8)
    chw, _ = pre.letterbox(image, SIZE, channels=1)
    with torch.no_grad():
        expected = model(torch.from_numpy(chw)[None])[0].numpy()
    rows = []
    for runtime in ("onnxruntime", "openvino"):
        BACKENDS[runtime].build(tmp_path / "fp32.onnx", tmp_path / runtime, "fp32")
        with open_engine(tmp_path / runtime, threads=1) as engine:
            assert engine.channels == 1 and engine.executed == "fp32" and engine.node_ms(1)
            assert np.allclose(engine(chw[None]), expected, atol=1e-3)
            with pytest.raises(ValueError, match=r"expected float32 \[1, 1, 64, 64\]"):
                engine(np.zeros((1, 3, *SIZE), np.float32))
            assert [part.shape for part in _inputs(engine, None)] == [(1, 1, *SIZE)]
            rows.append(Detector(engine, 0.25)(image))
    with TorchBackend(model, names(2), SIZE) as backend:
        assert backend.channels == 1
        rows.append(Detector(backend, 0.25)(image))
    assert len(rows[0]) and all(np.allclose(rows[0], other, atol=0.05) for other in rows[1:])

    np.save(tmp_path / "inputs.npy", np.stack([pre.letterbox(image, SIZE)[0]]))
    with OrtBackend(tmp_path / "fp32.onnx") as engine:
        (timed,) = _inputs(engine, str(tmp_path / "inputs.npy"))
    assert np.abs(timed[0] - chw).max() < 0.51 / 255

    check_signatures([tmp_path / "fp32.onnx"], SIZE, 2, channels=1)
    with pytest.raises(GateFailed, match=r"images \[B, 3, 64, 64\]"):
        check_signatures([tmp_path / "fp32.onnx"], SIZE, 2, channels=3)
    about = {"names": names(2), "name": "grey", "version": 1, "onnx": {"fp32": "fp32.onnx"}}
    deepstream.write(tmp_path, read(tmp_path / "fp32.onnx"), about, "fp32")
    config = (tmp_path / "deepstream" / "config_infer_primary.txt").read_text()
    assert "\nmodel-color-format=2\n" in config and "\ninfer-dims=1;64;64\n" in config
    deepstream.check(tmp_path, read(tmp_path / "fp32.onnx"), about)


@pytest.mark.fault(78)
def test_an_input_of_other_channels_is_refused(tmp_path: Path) -> None:
    net = Net(size=(1, 4, *SIZE))
    net.ends(
        net.op(
            "Reshape", [net.conv("images", "conv", into=4, out=5), net.constant("shape", [1, 5, -1], np.int64)], "out"
        )
    )
    model = net.model()
    onnx.helper.set_model_props(model, {"names": "{0: 'a'}", "imgsz": "[64, 64]"})
    onnx.save(model, str(tmp_path / "net.onnx"))
    with (
        pytest.raises(EngineError, match="images of 4 channels, expected 3 .RGB. or 1 .grey."),
        OrtBackend(tmp_path / "net.onnx"),
    ):
        pass


# --- few images -------------------------------------------------------------------------------------------------------


def job(count: int, **changes: Any) -> Any:
    samples = [SimpleNamespace(sha256=f"{k:064x}", name=f"{k}.png", image=Path(f"{k}.png")) for k in range(count)]
    dataset = SimpleNamespace(train=samples, val=samples, channels=3, names=quant_net.NAMES)
    return SimpleNamespace(dataset=dataset, recipe=SimpleNamespace(run=SimpleNamespace(seed=0)), **changes)


@pytest.mark.fault(17)
def test_fewer_calibration_images_than_asked_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(_calibration_images.calibration_samples(job(3), 3)) == 3
    assert capsys.readouterr().err == ""
    assert len(_calibration_images.calibration_samples(job(3), 64)) == 3
    assert capsys.readouterr().err == "calibration: all 3 training images, fewer than the 64 of calib_images\n"


@pytest.mark.fault(17)
@pytest.mark.parametrize("value", [0, 114, 255])
def test_calibration_images_that_are_all_of_one_colour_are_refused(tmp_path: Path, value: int) -> None:
    samples = [SimpleNamespace(image=tmp_path / f"{number}.png") for number in range(3)]
    for sample in samples:
        PIL.Image.new("RGB", (64, 48), (value,) * 3).save(sample.image)
    model = quant_net.net()
    with pytest.raises(DataError, match=r"calibration: all 3 images are of one colour, such as .*0\.png") as caught:
        ptq(model, lambda: _calibration_images.letterboxed(samples, SIZE), "max")
    assert caught.value.exit_code == 3
    PIL.Image.effect_noise((64, 48), 90).convert("RGB").save(samples[-1].image)
    ptq(model, lambda: _calibration_images.letterboxed(samples, SIZE), "max")


def test_batchnorm_follows_within_the_steps_of_a_run() -> None:
    """No more than exp(-3) of the old statistics are left, however few the steps; of 100 and more Ultralytics' momentum stays."""
    for steps, expected in ((1, 1.0), (3, 1.0), (10, 0.3), (100, 0.03), (1000, 0.03)):
        norm = nn.BatchNorm2d(1, momentum=0.03)
        settle(norm, steps)
        assert norm.momentum == pytest.approx(expected) and (1 - norm.momentum) ** steps < np.exp(-3)


def test_rounding_that_a_network_amplifies_is_no_fault_of_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bounds that float32 cannot keep stand for such a network: what torch itself is off by is allowed, another graph is not."""
    monkeypatch.setattr(export, "MAX_DIFFERENCE", {"scores": 1e-12, "boxes_px": 1e-12})
    monkeypatch.setattr(export, "read_image", lambda _: np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8))
    model = quant_net.net()
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=quant_net.NAMES)
    difference = export._compare(job(2, imgsz_hw=SIZE), model, tmp_path / "fp32.onnx")
    assert 0 < difference["boxes_px"] < 0.01
    assert "amplifies rounding" in capsys.readouterr().err
    with pytest.raises(CompressError, match="differs from torch on 2 images"):
        export._compare(job(2, imgsz_hw=SIZE), quant_net.net(seed=1), tmp_path / "fp32.onnx")


@pytest.mark.fault(41)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("model.4.m.0.cv1.conv.weight", r"model\.4 \(C2f\), by .* of "),
        ("model.0.conv.weight", r"model\.0 \(Conv\), by "),
        ("model.22.cv3.0.2.weight", r"model\.22 \(Detect\), all before it agree"),
    ],
)
def test_a_graph_that_computes_something_else_stops_the_export_and_the_layer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str, layer: str, batch: int
) -> None:
    monkeypatch.setattr(export, "read_image", lambda _: np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8))
    file, model = tmp_path / "fp32.onnx", quant_net.net()
    export_onnx(model, file, SIZE, names=quant_net.NAMES, batch=batch)
    assert export._compare(job(2, imgsz_hw=SIZE), model, file)["scores"] < 1e-4
    graph = onnx.load(str(file))
    (tensor,) = (one for one in graph.graph.initializer if one.name == weight)
    values = onnx.numpy_helper.to_array(tensor)
    noise = np.random.default_rng(1).normal(size=values.shape).astype(np.float32) * values.std()
    tensor.CopyFrom(onnx.numpy_helper.from_array(values + noise, weight))
    onnx.save(graph, str(file))
    with pytest.raises(
        NumericsError, match=rf"differs from torch on 2 images: .*The first layer that differs: {layer}"
    ):
        export._compare(job(2, imgsz_hw=SIZE), model, file)


# --- bundle -----------------------------------------------------------------------------------------------------------


def test_networks_with_nms_lie_in_the_bundle_but_no_engine_is_made_of_them(tmp_path: Path) -> None:
    """Their output is another: as one of the networks that may take each other's place they stopped every bundle."""
    files = ["original/fp32.onnx", "compressed/fp32.onnx", "compressed/fp32-nms.onnx", "compressed/int8-implicit.onnx"]
    for name in files:
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / name).write_text(name)
    artifact: Any = SimpleNamespace(
        manifest=SimpleNamespace(files=files), file=lambda name: tmp_path / "export" / name
    )  # fmt: skip
    root = tmp_path / "bundle"
    root.mkdir()
    assert make._networks(root, artifact) == {"fp32": "onnx/fp32.onnx"}
    assert sorted(file.name for file in (root / "onnx").iterdir()) == [
        "fp32-nms.onnx",
        "fp32.onnx",
        "int8-implicit.onnx",
    ]
