"""Each rule of lint finds the fault in a graph built for it and nothing in the corrected graph. Counts on real models."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.support.lint_graphs import Net
from yolo_compress.cli.main import main
from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, StorageError
from yolo_compress.evaluate.ab.contender import open_contender
from yolo_compress.lint import isolated
from yolo_compress.lint.check import RULES, SHOWN, Report, check
from yolo_compress.lint.graph import Graph
from yolo_compress.lint.rule import SEVERITIES, WHOLE
from yolo_compress.lint.targets import RUNTIMES, TARGETS, UNSIGNED

F16, BF16 = TensorProto.FLOAT16, TensorProto.BFLOAT16


def sound(opset: int = 17, size: tuple = (1, 3, 32, 32), **pair: object) -> Net:
    """Two INT8 convolutions and a float head, without faults for TensorRT up to 10; `pair` changes the second Q/DQ."""
    net = Net(opset, size)
    return net.head(net.int8_conv(net.pair(net.stem(), **pair), "second"))


def second(**weight: object) -> Net:
    net = Net()
    return net.head(net.int8_conv(net.pair(net.stem()), "second", **weight))


# One function per graph, named after its fault.


def bias(quantised: bool) -> Net:
    net = Net()
    weight = net.weight("second_w", (32, 32, 1, 1))
    if quantised:
        net.constant("codes", np.ones(32), np.int32)
        net.op("DequantizeLinear", ["codes", net.constant("bias_scale", np.float32(0.1))], "bias")
    else:
        net.constant("bias", np.ones(32, np.float32))
    return net.head(net.op("Conv", [net.pair(net.stem()), weight, "bias"], "second"))


def without_zero_point(q_typed: bool) -> Net:
    net = Net()
    net.constant("s", np.float32(0.1))
    net.constant("z", 0, np.int8)
    net.op("QuantizeLinear", [net.stem(), "s"] + ["z"] * q_typed, "q")
    return net.head(net.int8_conv(net.op("DequantizeLinear", ["q", "s"] + ["z"] * q_typed, "dq"), "second"))


def scale_of_maximum() -> Net:
    net = Net()
    net.op("ReduceMax", [net.stem()], "scale", keepdims=0)
    net.constant("z", 0, np.int8)
    net.op("QuantizeLinear", ["feature", "scale", "z"], "q")
    return net.head(net.int8_conv(net.op("DequantizeLinear", ["q", "scale", "z"], "dq"), "second"))


def unequal_pair() -> Net:
    net = sound()
    for node in net.nodes:
        if node.name == "feature_DQ":
            node.input[1] = net.constant("other", np.float32(0.2))
    return net


def transposed(axis: int) -> Net:
    net = Net()
    weight = net.weight("up_w", (32, 32, 1, 1), axis=axis)
    return net.head(net.op("ConvTranspose", [net.pair(net.stem()), weight], "up"))


def weight_in_float() -> Net:
    net = Net()
    net.constant("w", np.full((32, 32, 1, 1), 0.5, np.float32))
    net.constant("s", np.full(32, 0.5 / 63, np.float32))
    net.constant("z", np.zeros(32), np.int8)
    net.op("QuantizeLinear", ["w", "s", "z"], "w_Q", axis=0)
    net.op("DequantizeLinear", ["w_Q", "s", "z"], "w_DQ", axis=0)
    return net.head(net.conv(net.pair(net.stem()), "second", weight="w_DQ"))


def joined(left: float, right: float, out: float) -> Net:
    """Two INT8 branches, an INT8 concat, an INT8 convolution."""
    net = Net()
    a = net.int8_conv(net.pair(net.stem()), "a")
    b = net.int8_conv("feature_DQ", "b")
    net.op("Concat", [net.pair(a, left), net.pair(b, right)], "cat", axis=1)
    return net.head(net.int8_conv(net.pair("cat", out), "last", into=64))


def residual(how: str, scale: float = 0.1) -> Net:
    """x + conv(x), with Q/DQ on no input ("float"), on x ("residual", as NVIDIA recommends), on conv(x) ("branch"), on both."""
    net = Net()
    x = net.pair(net.stem())
    branch = net.int8_conv(x, "branch")
    if how in ("branch", "both"):
        branch = net.pair(branch, scale)
    net.op("Add", [x if how in ("residual", "both") else "feature", branch], "add")
    return net.head(net.int8_conv(net.pair("add"), "last"))


def parallel(quantised: bool) -> Net:
    """conv(x) + conv(x): neither input is residual."""
    net = Net()
    a = net.int8_conv(net.pair(net.stem()), "a")
    b = net.int8_conv("feature_DQ", "b")
    net.op("Add", [net.pair(a) if quantised else a, b], "add")
    return net.head(net.int8_conv(net.pair("add"), "last"))


def float_concat() -> Net:
    net = Net()
    a = net.int8_conv(net.pair(net.stem()), "a")
    net.op("Concat", [a, "feature_DQ"], "cat", axis=1)
    return net.head(net.int8_conv(net.pair("cat"), "last", into=64))


def pooled(before: float | None, after: float = 0.1, op: str = "MaxPool") -> Net:
    net = Net()
    x = net.stem() if before is None else net.pair(net.stem(), before)
    if op == "MaxPool":
        net.op(op, [x], "pool", kernel_shape=[5, 5], pads=[2, 2, 2, 2])
    else:
        net.op(op, [x, "", net.constant("sizes", [1, 1, 2, 2], np.float32)], "pool", mode="nearest")
    return net.head(net.int8_conv(net.pair("pool", after), "last"))


def read_by_relu(through: bool) -> Net:
    """A float tensor that a Q reads; a Relu reads it directly or after the DQ."""
    net = Net()
    x = net.pair(net.stem())
    net.op("Relu", [x if through else "feature"], "relu")
    y = net.int8_conv(x, "second")
    return net.ends(net.conv(y, "head", out=5), net.conv("relu", "head2", out=5))


def two_scales(one: float, two: float) -> Net:
    net = Net()
    a = net.int8_conv(net.pair(net.stem(), one, name="one_"), "a")
    b = net.int8_conv(net.pair("feature", two, name="two_"), "b")
    return net.ends(net.conv(a, "head", out=5), net.conv(b, "head2", out=5))


def float_weight() -> Net:
    net = Net()
    return net.head(net.conv(net.pair(net.stem()), "second"))


def int8_head() -> Net:
    net = Net()
    return net.ends(net.int8_conv(net.pair(net.stem()), "head", out=5))


def decode(kind: str) -> Net:
    """Concat of boxes and scores in float, quantised, in half precision, or half precision with a float concat."""
    net = Net(type=F16 if kind.startswith("half") else TensorProto.FLOAT)
    x = net.conv("images", "stem", into=3)
    boxes, scores = net.conv(x, "boxes", out=4), net.conv(x, "scores", out=5)
    if kind == "half, decoded in float":
        boxes, scores = (net.op("Cast", [name], f"{name}32", to=1) for name in (boxes, scores))
        net.type = TensorProto.FLOAT
    net.op("Concat", [boxes, scores], "output0", axis=1)
    if kind == "half":
        net.type = TensorProto.FLOAT
        return net.ends(net.op("Cast", ["output0"], "output32", to=1))
    return net.ends(net.pair("output0") if kind == "quantised" else "output0")


def wide(into: int, out: int) -> Net:
    net = Net()
    net.int8_conv(net.pair("images"), "stem", into=3, out=into)
    net.int8_conv(net.pair("stem"), "second", into=into, out=out)
    return net.ends(net.conv("second", "head", into=out, out=5))


def half_pair(opset: int) -> Net:
    net = Net(opset, type=F16)
    for name in ("images",):
        net.constant("s", 0.1, np.float16)
        net.constant("z", 0, np.int8)
        net.op("QuantizeLinear", [name, "s", "z"], "q")
        net.op("DequantizeLinear", ["q", "s", "z"], "dq")
    return net.ends(net.conv("dq", "head", into=3, out=5))


def plain(type: int = TensorProto.FLOAT, weight: float = 0.5, opset: int = 17) -> Net:
    net = Net(opset, type=type)
    kind = {F16: np.float16}.get(type, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the overflow is intended
        net.constant("w", np.full((5, 3, 1, 1), weight), kind, type=type)
    return net.ends(net.conv("images", "head", weight="w"))


def half_between() -> Net:
    """INT8 convolution with a float16 output, at opset 19."""
    net = Net(19, type=F16)
    net.constant("s", 0.1, np.float16)
    net.constant("z", 0, np.int8)
    net.op("QuantizeLinear", ["images", "s", "z"], "q")
    net.op("DequantizeLinear", ["q", "s", "z"], "dq")
    net.constant("w", np.ones((32, 3, 1, 1)), np.int8)
    net.constant("ws", np.full(32, 0.1), np.float16)
    net.constant("wz", np.zeros(32), np.int8)
    net.op("DequantizeLinear", ["w", "ws", "wz"], "w_DQ", axis=0)
    return net.head(net.conv("dq", "stem", weight="w_DQ"))


def with_op(kind: str, domain: str = "", opset: int = 17, inputs: tuple[str, ...] = ("feature",)) -> Net:
    net = Net(opset)
    net.conv("images", "feature", into=3)
    net.op(kind, list(inputs), "odd", domain=domain)
    net.declared = [1, 100, 4] if kind.endswith("TRT") else None
    return net.ends("odd")


def dynamically_quantised() -> Net:
    net = Net()
    net.op("DynamicQuantizeLinear", [net.conv("images", "feature", into=3)], "odd", outputs=3)
    return net.ends("odd_1")


def with_if() -> Net:
    net = Net()
    net.conv("images", "feature", into=3)
    body = helper.make_graph(
        [helper.make_node("Relu", ["feature"], ["y"])], "body", [], [helper.make_tensor_value_info("y", 1, None)]
    )
    net.op("If", [net.constant("yes", True)], "branch", then_branch=body, else_branch=body)
    return net.ends("branch")


def unknown_attribute() -> Net:
    net = plain()
    net.nodes[0].attribute.append(helper.make_attribute("colour", "red"))
    return net


def shaped(*shape: int, axis: int = 1) -> Net:
    net = Net()
    x = net.conv("images", "stem", into=3)
    x = net.op("Reshape", [x, net.constant("shape", list(shape), np.int64)], "reshape") if shape else x
    return net.ends(net.op("Concat", [x, x], "cat", axis=axis))


def unsigned() -> Net:
    net = Net()
    x = net.int8_conv(net.pair("images", zero=128, dtype=np.uint8), "stem", into=3)
    return net.head(net.int8_conv(net.pair(x, zero=128, dtype=np.uint8), "second"))


def weight_in_float_of(code: int) -> Net:
    net = weight_in_float()
    net.constant("w", np.full((32, 32, 1, 1), code * 0.5 / 63, np.float32))
    return net


def grouped(groups: int) -> Net:
    net = Net()
    return net.head(net.conv(net.conv("images", "stem", into=3), "second", into=32 // groups, group=groups))


def int8_outputs(quantised: bool) -> Net:
    net = Net()
    x = net.int8_conv(net.pair("images"), "stem", into=3)
    return net.head(net.pair(x) if quantised else x)


def equal_weights(value: float) -> Net:
    net = Net()
    x = net.conv(net.conv(net.conv("images", "stem", into=3), "first"), "second")
    net.constant("second_w", np.full((32, 32, 1, 1), value), np.float32)
    return net.head(x)


T = "tensorrt"
Row = tuple[Callable[[], Net], Callable[[], Net], str, list[str]]
# rule -> graph with the fault, the same graph without it, target, expected nodes
CASES: dict[str, list[Row]] = {
    "zero-point": [
        (lambda: sound(zero=3), sound, T, ["feature_Q", "feature_DQ"]),
        (lambda: sound(zero=3, dtype=np.uint8), sound, "dla-10.3", ["feature_Q", "feature_DQ"]),
    ],
    "code-type": [
        (lambda: sound(dtype=np.uint8), sound, T, ["feature_Q", "feature_DQ"]),
        (lambda: without_zero_point(False), lambda: without_zero_point(True), T, ["q", "dq"]),
    ],
    "bias-int32": [(lambda: bias(True), lambda: bias(False), T, ["bias"])],
    "scale-value": [
        (lambda: sound(scale=0.0), sound, "openvino", ["feature_Q", "feature_DQ"]),
        (lambda: sound(scale=np.nan), sound, T, ["feature_Q", "feature_DQ"]),
        (lambda: second(scales=[np.inf, *[0.01] * 31]), second, T, ["second_w_DQ"]),
        (lambda: sound(scale=-0.1), sound, "onnxruntime", ["feature_Q", "feature_DQ"]),
    ],
    "scale-computed": [(scale_of_maximum, sound, T, ["q", "dq"])],
    "pair-unequal": [(unequal_pair, sound, T, ["feature_DQ"])],
    "weight-per-tensor": [(lambda: second(scales=0.01), second, T, ["second"])],
    "weight-axis": [
        (lambda: second(axis=1), second, T, ["second"]),
        (lambda: transposed(0), lambda: transposed(1), T, ["up"]),
    ],
    "feature-per-channel": [
        (lambda: sound(scale=[0.1] * 32), lambda: sound(scale=0.1), T, ["feature_Q", "feature_DQ"])
    ],
    "weight-float": [(weight_in_float, second, T, ["second"])],
    "feature-signed": [(sound, unsigned, "openvino", ["images_Q", "feature_Q"])],
    "weight-saturates": [
        (lambda: second(code=64), lambda: second(code=-63), "onnxruntime", ["second"]),
        (lambda: weight_in_float_of(127), lambda: weight_in_float_of(63), "openvino", ["second"]),
    ],
    "scales-concat": [
        (lambda: joined(0.1, 0.2, 0.1), lambda: joined(0.1, 0.1, 0.1), T, ["cat"]),
        (lambda: joined(0.1, 0.1, 0.2), lambda: joined(0.2, 0.2, 0.2), T, ["cat"]),
    ],
    "scales-add": [(lambda: residual("both", 0.2), lambda: residual("both", 0.1), T, ["add"])],
    "scales-pass": [
        (lambda: pooled(0.1, 0.2), lambda: pooled(0.1, 0.1), "openvino", ["pool"]),
        (lambda: pooled(0.1, 0.2, "Resize"), lambda: pooled(0.1, 0.1, "Resize"), T, ["pool"]),
    ],
    "scales-tensor": [(lambda: two_scales(0.1, 0.2), lambda: two_scales(0.1, 0.1), "onnxruntime", ["feature"])],
    "add-float": [
        (lambda: residual("float"), lambda: residual("residual"), T, ["add"]),
        (lambda: residual("branch"), lambda: residual("both"), T, ["add"]),
        (lambda: parallel(False), lambda: parallel(True), T, ["add"]),
    ],
    "concat-float": [(float_concat, lambda: joined(0.1, 0.1, 0.1), "openvino", ["cat"])],
    "pool-float": [
        (lambda: pooled(None), lambda: pooled(0.1), T, ["pool"]),
        (lambda: pooled(None, op="Resize"), lambda: pooled(0.1, op="Resize"), T, ["pool"]),
    ],
    "mixed-readers": [(lambda: read_by_relu(False), lambda: read_by_relu(True), T, ["feature"])],
    "one-sided": [(float_weight, second, T, ["second"])],
    "head-int8": [(int8_head, sound, T, ["head"])],
    "output-int8": [(lambda: decode("quantised"), lambda: decode("plain"), "openvino", ["output0"])],
    "channels-8": [(lambda: wide(32, 28), lambda: wide(24, 8), T, ["second", "head"])],
    "channels-16": [
        (lambda: wide(32, 24), lambda: wide(48, 16), T, ["second"]),  # the head reads it in float
        (lambda: wide(32, 24), lambda: wide(48, 16), "openvino", ["second", "head"]),
    ],
    "channels-32": [(lambda: wide(32, 48), lambda: wide(32, 64), T, ["second"])],
    "dynamic-batch": [(lambda: sound(size=("n", 3, 32, 32)), sound, T, ["images"])],
    "dynamic-size": [(lambda: sound(size=("n", 3, "h", "w")), lambda: sound(size=("n", 3, 32, 32)), T, ["images"])],
    "dla-dynamic": [(lambda: sound(size=("n", 3, 32, 32)), sound, "dla-11.4", ["images"])],
    "half-qdq": [(lambda: half_pair(17), lambda: half_pair(19), "tensorrt-10.3", ["q", "dq"])],
    "bf16": [
        (lambda: plain(BF16, opset=22), lambda: plain(F16, opset=22), "onnxruntime", ["head"]),
        (lambda: plain(BF16), plain, "tensorrt-8.6", ["head"]),
    ],
    "half-infinite": [(lambda: plain(F16, 1e6), lambda: plain(F16, 6e4), T, ["w"])],
    "half-range": [(lambda: plain(weight=-1e6), lambda: plain(weight=-6e4), "tensorrt-10.3", ["head"])],
    "half-boxes": [
        (lambda: decode("half"), lambda: decode("half, decoded in float"), T, ["output0"]),
    ],
    "float-between": [(sound, half_between, "tensorrt-11.4", [WHOLE])],
    "opset": [
        (lambda: sound(18), sound, T, [WHOLE]),
        (lambda: sound(21), lambda: sound(20), "tensorrt-10.3", [WHOLE]),
        (lambda: plain(opset=8), lambda: plain(opset=9), "tensorrt-10.3", [WHOLE]),
        (lambda: plain(opset=17), lambda: plain(opset=13), "tensorrt-8.2", [WHOLE]),
    ],
    "checker": [
        (unknown_attribute, plain, "openvino", [WHOLE]),
        (lambda: with_op("DynamicQuantizeLinear"), dynamically_quantised, T, [WHOLE]),
    ],
    "operator": [
        (dynamically_quantised, lambda: with_op("Relu"), T, ["odd"]),
        (lambda: with_op("QLinearAdd", "com.microsoft"), lambda: with_op("Relu"), "tensorrt-8.6", ["odd"]),
        (lambda: with_op("EfficientNMS_TRT"), lambda: with_op("Relu"), "onnxruntime", ["odd"]),
        (lambda: with_op("EfficientNMS_ONNX_TRT"), lambda: with_op("Relu"), "tensorrt-10.16", ["odd"]),
        (lambda: with_op("Mod", opset=13, inputs=("feature", "feature")), plain, "tensorrt-8.2", ["odd"]),
    ],
    "converter": [
        (lambda: with_op("Tanh"), lambda: with_op("Relu"), "litert", ["odd"]),
        (lambda: with_op("Tanh"), lambda: with_op("Relu"), "coreml", ["odd"]),
        (lambda: sound(size=(2, 3, 32, 32)), lambda: sound(size=("n", 3, 32, 32)), "ncnn", ["images"]),
        (lambda: sound(size=(1, 3, "h", "w")), sound, "ncnn", [WHOLE]),
        (lambda: grouped(16), lambda: grouped(32), "litert", ["second"]),
        (lambda: int8_outputs(False), lambda: int8_outputs(True), "litert", ["stem"]),
        (lambda: equal_weights(0.5), lambda: equal_weights(0.25), "ncnn", ["second"]),
        (lambda: second(scales=0.01), second, "ncnn", ["second"]),
    ],
    "operator-deprecated": [
        (lambda: with_op("EfficientNMS_TRT"), lambda: with_op("NonZero"), "tensorrt-10.13", ["odd"])
    ],
    "body": [(with_if, plain, T, ["branch"])],
    "dla-layer": [
        (lambda: shaped(1, 32, 1024), lambda: shaped(1, 32, 16, 64), "dla-10.3", ["reshape", "cat"]),
        (lambda: shaped(axis=2), shaped, "dla-10.3", ["cat"]),
        (lambda: with_op("Gelu", opset=20), lambda: with_op("Relu", opset=20), "dla-10.3", ["odd"]),
    ],
    "dla-qdq": [(sound, plain, "dla-8.5", [WHOLE])],
}


def found(net: Net, target: str, folder: Path) -> dict[str, list[str]]:
    report = check(net.save(folder / "net.onnx"), target)
    return {rule: [f.node for f in report.findings if f.rule == rule] for rule in report.rules}


@pytest.mark.parametrize(("rule", "row"), [(rule, row) for rule, rows in CASES.items() for row in rows])
def test_a_rule_fires_on_its_fault_and_only_there(rule: str, row: Row, tmp_path: Path) -> None:
    faulty, whole, target, nodes = row
    assert found(faulty(), target, tmp_path).get(rule) == nodes
    assert rule not in found(whole(), target, tmp_path)


COMPILED_RULES = ("rtx-refused", "rtx-float")  # in test_rtx


def test_every_rule_has_a_case_and_says_what_to_do() -> None:
    assert {*CASES, *COMPILED_RULES} == set(RULES) and len(RULES) == len({rule.find for rule in RULES.values()})
    for name, rule in RULES.items():
        assert rule.id == name == name.lower() and len(name) < 22 and rule.severity in SEVERITIES
        assert rule.consequence.endswith(".") and rule.fix.endswith(".") and set(rule.runtimes) <= set(RUNTIMES)


def test_an_operator_unknown_to_onnx_is_no_checker_error(tmp_path: Path) -> None:
    assert found(with_op("EfficientNMS_TRT"), "tensorrt-10.3", tmp_path) == {}


@pytest.mark.parametrize("name", [name for name, row in TARGETS.items() if not row.compiled])
def test_a_sound_graph_and_a_float_one_are_sound_for_every_target(name: str, tmp_path: Path) -> None:
    net = sound(13)
    expected = {"float-between": [WHOLE]} if name in ("tensorrt", "tensorrt-11.4", "dla-11.4") else {}
    if name == "dla-8.5":
        expected = {"dla-qdq": [WHOLE]}
    if TARGETS[name].runtime in UNSIGNED:
        expected = {"feature-signed": ["images_Q", "feature_Q"]}
    if name == "litert":
        expected = {"converter": ["stem"]}
    assert found(net, name, tmp_path) == expected
    assert found(plain(opset=13), name, tmp_path) == {}


def test_rules_look_through_identity_and_noop_casts(tmp_path: Path) -> None:
    """ModelOpt's exporter adds casts of float to float, torch's adds an Identity for each shared constant."""
    net = Net()
    x = net.op("Cast", [net.pair(net.stem())], "cast", to=1)
    shared = net.op("Identity", [net.constant("s", np.float32(0.1))], "same")
    net.op("Relu", [net.op("Identity", [net.int8_conv(x, "second")], "identity")], "relu")
    net.op("QuantizeLinear", ["relu", shared, net.constant("z", 0, np.int8)], "q")
    net.op("DequantizeLinear", ["q", shared, "z"], "dq")
    report = check(net.head(net.int8_conv("dq", "third")).save(tmp_path / "net.onnx"), "tensorrt-8.5")
    assert report.findings == () and report.facts["int8_convs"] == 3


# Real models


def build(folder: Path) -> Path:
    """fp32.onnx and int8.onnx of a YOLOv8n with random weights."""
    from tests.support.quant_net import NAMES, SIZE, images, net
    from yolo_compress.export.float_onnx import export_onnx
    from yolo_compress.export.qdq import insert_qdq
    from yolo_compress.quant.calibrate import ptq
    from yolo_compress.quant.ranges import fold

    model = net()
    export_onnx(model, folder / "fp32.onnx", SIZE, names=NAMES)
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    insert_qdq(folder / "fp32.onnx", folder / "int8.onnx", state, "tensorrt10")
    for form in ("openvino", "onnxruntime"):
        insert_qdq(folder / "fp32.onnx", folder / f"int8-{form}.onnx", state, form)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ours"))


def nodes(report: Report, rule: str) -> list[str]:
    return [finding.node for finding in report.findings if finding.rule == rule]


C2F_ADDS = [f"/model.{block}/m.{i}/Add" for block, count in ((2, 1), (4, 2), (6, 2), (8, 1)) for i in range(count)]
CONCATS = [f"/model.{block}/Concat" for block in (2, 4, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21)]
POOLS = ["/model.9/m/MaxPool", "/model.9/m_1/MaxPool", "/model.9/m_2/MaxPool", "/model.10/Resize", "/model.13/Resize"]


def test_our_float_graph_has_no_findings(ours: Path) -> None:
    for name in TARGETS:
        if name != "tensorrt-8.2":
            rules = check(ours / "fp32.onnx", name).rules
            assert set(rules) == ({"dla-layer"} if name.startswith("dla") else set()), name
    assert check(ours / "fp32.onnx", "tensorrt-8.2").rules == {"opset": 1}


def test_our_half_graph_has_no_findings(ours: Path, tmp_path: Path) -> None:
    from yolo_compress.export.fp16 import to_fp16

    to_fp16(ours / "fp32.onnx", tmp_path / "fp16.onnx")
    for name in ("tensorrt-8.5", "tensorrt-11.4", "onnxruntime", "openvino"):
        assert check(tmp_path / "fp16.onnx", name).rules == {}


def test_our_int8_graph_has_nothing_in_float_that_could_be_int8(ours: Path) -> None:
    report = check(ours / "int8.onnx", "tensorrt")
    assert report.facts == {"opset": 17, "convs": 63, "int8_convs": 57, "q": 92, "dq": 149}
    assert (report.count("error"), set(report.rules)) == (0, {"float-between", "channels-32"})
    assert nodes(
        report, "channels-32"
    ) == [  # YOLOv8n begins 16 wide; 48 = 3 * 16 enters the first C2f's last convolution
        "/model.0/conv/Conv",
        "/model.1/conv/Conv",
        "/model.2/m.0/cv1/conv/Conv",
        "/model.2/m.0/cv2/conv/Conv",
        "/model.2/cv2/conv/Conv",
    ]
    assert "float-between" not in check(ours / "int8.onnx", "tensorrt-10.16").rules
    assert check(ours / "int8-openvino.onnx", "openvino").rules == {}


def test_a_form_for_one_runtime_is_wrong_for_another(ours: Path) -> None:
    uint8 = check(ours / "int8-openvino.onnx", "tensorrt")
    assert uint8.rules["zero-point"] == uint8.rules["code-type"] == 116 and uint8.count("error") == 232
    int8 = check(ours / "int8.onnx", "openvino")
    assert (int8.rules["feature-signed"], int8.count("error")) == (92, 0) and "weight-saturates" not in int8.rules


def test_files_for_runtimes_with_a_converter(ours: Path, tmp_path: Path) -> None:
    from yolo_compress.export.nms import with_nms

    for target, stem in (("ncnn", "int8"), ("coreml", "int8"), ("litert", "int8-onnxruntime")):
        assert check(ours / f"{stem}.onnx", target).count("error") == 0
    report = check(ours / "int8.onnx", "litert")
    assert [(one.rule, one.node) for one in report.findings if one.severity == "error"] == [
        ("converter", "/model.0/conv/Conv")
    ]
    with_nms(ours / "fp32.onnx", tmp_path / "nms.onnx")
    for target in ("ncnn", "coreml", "litert"):
        found = [one.what for one in check(tmp_path / "nms.onnx", target).findings if one.rule == "converter"]
        assert found == ["has NMS in its graph; give the file without NMS"], target


def test_pruned_widths_are_seen(ours: Path, tmp_path: Path) -> None:
    """A convolution of 13 channels in the middle of our graph."""
    model = onnx.load(str(ours / "fp32.onnx"))
    kept = {"model.2.m.0.cv1.conv.weight": 0, "model.2.m.0.cv1.conv.bias": 0, "model.2.m.0.cv2.conv.weight": 1}
    for item in model.graph.initializer:
        if item.name in kept:
            array = onnx.numpy_helper.to_array(item)
            item.CopyFrom(onnx.numpy_helper.from_array(array.take(range(13), axis=kept[item.name]), item.name))
    del model.graph.value_info[:]
    onnx.save(model, str(tmp_path / "pruned.onnx"))
    report = check(tmp_path / "pruned.onnx", "tensorrt-10.3")
    assert [(finding.rule, finding.node, finding.what) for finding in report.findings] == [
        ("channels-8", "/model.2/m.0/cv1/conv/Conv", "13 out, float"),
        ("channels-8", "/model.2/m.0/cv2/conv/Conv", "13 in, float"),
    ]


def test_ultralytics_int8_onnx_export(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`yolo export format=onnx quantize=8` quantises its float graph with this function."""
    from ultralytics.utils.export.onnx import onnx_int8_quantize

    from tests.support.quant_net import images

    monkeypatch.chdir(tmp_path)  # ONNX Runtime writes its augmented model here
    batches = [images(1, seed) for seed in range(4)]
    onnx_int8_quantize(str(ours / "fp32.onnx"), str(tmp_path / "u.onnx"), batches, lambda batch: batch.numpy())
    report = check(tmp_path / "u.onnx", "tensorrt")
    assert report.facts["int8_convs"] == 63  # the head's outputs too
    assert report.rules["bias-int32"] == report.rules["weight-per-tensor"] == 63
    assert report.rules["zero-point"] > 100 and report.rules["scales-concat"] > 0
    assert nodes(report, "concat-float") == CONCATS and nodes(report, "pool-float") == POOLS
    assert sorted(nodes(report, "head-int8")) == sorted(
        f"/model.22/{branch}.{i}/{branch}.{i}.2/Conv" for branch in ("cv2", "cv3") for i in range(3)
    )
    assert not {"add-float", "mixed-readers"} & set(report.rules)  # every reader reads through the pair
    cpu = check(tmp_path / "u.onnx", "onnxruntime")
    assert cpu.rules["feature-signed"] == report.facts["q"] and cpu.rules["weight-saturates"] == 63


@pytest.mark.slow
def test_ultralytics_qat_export(tmp_path: Path) -> None:
    """`yolo train quantize=8` uses these two functions. It quantises 0 of 6 adds and 0 of 13 concats, and 15 tensors are
    read both as INT8 and as float (YOLOv8s has the same layers)."""
    from ultralytics.utils.export.engine import torch2onnx
    from ultralytics.utils.torch_utils import prepare_qat

    from tests.support.quant_net import images, net
    from yolo_compress.quant.fakequant import _modelopt

    _modelopt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare_qat(net(), [images(4)], lambda batch: batch).eval().fuse(verbose=False).requires_grad_(False)
        model.model[-1].export, model.model[-1].format = True, "onnx"
        for module in model.modules():
            if "C2f" in type(module).__name__:
                module.forward = module.forward_split
        model(images(1))
        torch2onnx(model, images(1), str(tmp_path / "u.onnx"), 17, ["images"], ["output0"])
    report = check(tmp_path / "u.onnx", "tensorrt")
    assert report.facts["int8_convs"] == 57 and report.count("error") == 0
    assert nodes(report, "add-float") == C2F_ADDS and nodes(report, "concat-float") == CONCATS
    assert report.rules["mixed-readers"] == 15
    assert nodes(report, "pool-float") == POOLS[3:]  # ModelOpt quantises max-pools
    assert report.rules["weight-float"] == 57


# The verb


def test_text_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sound(zero=3, dtype=np.uint8).save(tmp_path / "net.onnx")
    assert main(["lint", str(file)]) == 1
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1])
    assert (document["target"], document["error"], document["int8_convs"]) == ("tensorrt", 4, 2)
    assert document["rules"] == {"zero-point": 2, "code-type": 2, "float-between": 1}
    first = document["findings"][0]
    assert set(first) == {"rule", "severity", "node", "what", "consequence", "fix"}
    assert (first["rule"], first["node"], first["what"]) == ("zero-point", "feature_Q", "zero point 3")
    assert "error zero-point (2)" in out and "    feature_Q: zero point 3" in out
    assert f"  fix: {first['fix']}" in out and out[-2] == "4 errors, 1 warning, 0 info"
    assert "TensorRT 8.5 to 11.4" in out[0]


def test_long_lists_are_cut_in_the_text_alone(tmp_path: Path) -> None:
    net = Net()
    x = net.stem()
    for index in range(SHOWN + 3):
        x = net.int8_conv(net.pair(x), f"conv{index}", scales=0.1)
    report = check(net.head(x).save(tmp_path / "net.onnx"), "tensorrt-8.5")
    assert report.rules == {"weight-per-tensor": SHOWN + 3} and len(report.as_json()["findings"]) == SHOWN + 3
    assert f"    conv{SHOWN - 1}: one scale for 32 output channels" in report.text().splitlines()
    assert f"conv{SHOWN}:" not in report.text() and "... and 3 more, in the JSON" in report.text()


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound().save(tmp_path / "net.onnx")
    assert main(["lint", str(tmp_path / "net.onnx"), "target=tensorrt-8.5"]) == 0
    assert main(["lint", str(tmp_path / "net.onnx"), "--target", "tensorrt"]) == 0  # a warning alone
    assert main(["lint", str(tmp_path / "net.onnx"), "target=dla-8.5"]) == 1
    for words, code, says in (
        (["target=tensorrt-9"], 2, "lint target=tensorrt-9: unknown, expected one of tensorrt, tensorrt-8.2"),
        (["other.onnx"], 2, "lint takes one file, got 2; usage: yolo-compress lint FILE.onnx [target=NAME]"),
        (["recipe=digits"], 2, "lint takes no recipe"),
    ):
        assert main(["lint", str(tmp_path / "net.onnx"), *words]) == code
        assert says in capsys.readouterr().err
    assert main(["lint"]) == 2
    assert main(["lint", str(tmp_path / "gone.onnx")]) == 4
    (tmp_path / "text.onnx").write_text("not a model")
    assert main(["lint", str(tmp_path / "text.onnx")]) == 5
    assert main(["lint", str(tmp_path)]) == 6
    assert capsys.readouterr().out.count("{") == 0


# Damaged and malicious files


def refused(file: Path, says: str, error: type[Exception] = CorruptArtifact) -> None:
    with pytest.raises(error) as caught:
        check(file)
    assert str(caught.value).startswith(f"{file}: ") and says in str(caught.value)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    refused(file, "no such file", EnvironmentLacks)
    refused(tmp_path, "cannot be read", StorageError)
    for data in (b"", b"\0" * 99, b"PK\x03\x04 something", bytes(range(256))):
        file.write_bytes(data)
        refused(file, "not an ONNX")
    whole = sound().model().SerializeToString()
    for size in (1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file, "ONNX")


@pytest.mark.fault(29)
def test_inconsistent_graphs_are_refused(tmp_path: Path) -> None:
    net = sound()
    net.nodes.reverse()
    refused(net.save(tmp_path / "net.onnx"), "which no earlier node computes")
    net = sound()
    net.nodes.append(net.nodes[-1])
    refused(net.save(tmp_path / "net.onnx"), "computed twice")
    refused(sound().ends("nowhere").save(tmp_path / "net.onnx"), "no node computes the output nowhere")
    model = sound().model()
    next(item for item in model.graph.initializer if item.name == "feature_scale").raw_data = b"\0"
    onnx.save(model, str(tmp_path / "net.onnx"))
    refused(tmp_path / "net.onnx", "tensor feature_scale is damaged")


def test_malformed_nodes(tmp_path: Path) -> None:
    net = sound()
    del net.nodes[0].input[1:]
    refused(net.save(tmp_path / "net.onnx"), " has 1 inputs and 1 outputs, too few")
    net = second()
    next(node for node in net.nodes if node.name == "second_w_DQ").attribute[0].CopyFrom(
        helper.make_attribute("axis", "one")
    )
    net.save(tmp_path / "net.onnx")
    with pytest.raises(CorruptArtifact, match="second_w_DQ: attribute axis is bytes, expected int"):
        check(tmp_path / "net.onnx")


@pytest.mark.parametrize("seed", range(4))
def test_altered_bytes_give_a_report_or_an_error_of_ours(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    whole = [row[0]().model().SerializeToString() for rows in CASES.values() for row in rows]
    for _ in range(300):
        data = bytearray(choose.choice(whole))
        for _ in range(choose.choice([1, 1, 3])):
            data[choose.randrange(len(data))] = choose.randrange(256)
        (tmp_path / "net.onnx").write_bytes(data)
        with contextlib.suppress(CorruptArtifact):
            assert check(tmp_path / "net.onnx", choose.choice(list(TARGETS))).text()


def external(folder: Path, location: str, length: int | None = None) -> Path:
    """A model whose head weight is stored at `location`, `length` bytes of it."""
    model = sound().model()
    tensor = next(item for item in model.graph.initializer if item.name == "head_w")
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location, 0, length or len(tensor.raw_data))
    tensor.ClearField("raw_data")
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


@pytest.mark.fault(28)
def test_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"x" * 10_000)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    assert set(check(external(folder, "weights.bin")).rules) == {"float-between"}
    for outside in ("../secret.bin", str(tmp_path / "secret.bin"), "link.bin", "sub/../../secret.bin"):
        refused(external(folder, outside), "outside the model's folder")
    refused(external(folder, "gone.bin"), "'gone.bin', which does not exist")
    refused(external(folder, "weights.bin", 10_000), "up to byte 10000, but that file has 640")


def test_lint_needs_onnx_and_numpy_only(tmp_path: Path) -> None:
    file = sound().save(tmp_path / "net.onnx")
    program = (
        "import sys; from yolo_compress.lint.isolated import main; code = main([sys.argv[1], 'tensorrt']); "
        "print(code, *sorted({'torch', 'ultralytics', 'onnxruntime', 'cv2', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


# Files that need more time or memory than a detector


def calling(calls: list[list[str]]) -> onnx.ModelProto:
    """A model with functions F0, F1, ...; `calls` lists the functions or operators that each one calls."""
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    functions = []
    for number, called in enumerate(calls):
        tensors = ["x", *(f"y{i}" for i in range(len(called)))]
        body = [
            helper.make_node(op, [tensors[i]], [tensors[i + 1]], domain="d" if op.startswith("F") else "")
            for i, op in enumerate(called)
        ]
        functions.append(helper.make_function("d", f"F{number}", ["x"], [tensors[-1]], body, sets))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("F0", ["a"], ["b"], domain="d")], "g", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=sets, functions=functions)


@pytest.mark.fault(29)
def test_functions_that_double_or_call_themselves(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    doubling = [[f"F{i + 1}"] * 2 for i in range(22)] + [["Relu", "Relu"]]
    for calls, says in (
        (doubling, "more than 100000 nodes with functions inlined"),
        ([["F0"]], "function F0 calls itself"),
        ([["F1"], ["Relu", "F0"]], "function F0 calls itself"),
        ([[f"F{i + 1}"] for i in range(80)] + [["Relu"]], "or calls are nested more than 50 deep"),
    ):
        onnx.save(calling(calls), str(file))
        refused(file, says)
    onnx.save(calling([["F1", "F1"], ["Relu"]]), str(file))
    assert check(file).facts["opset"] == 17


def test_a_chain_of_nodes_that_do_nothing_is_walked_without_recursion(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(3000)]
    nodes.append(helper.make_node("Relu", ["t3000"], ["out"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ("t0", "out")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    graph = Graph(model)
    assert graph.source_of("t3000") == "t0" == graph.source_of("t0")
    assert [(node.op_type, name) for node, name in graph.readers("t0") if node] == [("Relu", "t3000")]
    onnx.save(model, str(tmp_path / "net.onnx"))
    assert check(tmp_path / "net.onnx").count("error") == 0


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("offset", "-4", "has an invalid location"),
        ("length", "-8", "has an invalid location"),
        ("offset", "abc", "has an invalid location"),
        ("offset", str(1 << 62), "but that file has 640"),
    ],
)
def test_external_data_at_an_invalid_location(tmp_path: Path, key: str, value: str, says: str) -> None:
    file = external(tmp_path, "weights.bin")
    model = onnx.load(str(file), load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.name == "head_w")
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
    file.write_bytes(model.SerializeToString())
    refused(file, says)


@pytest.mark.fault(29)
def test_a_file_that_takes_too_long_or_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sound().save(tmp_path / "net.onnx")
    slow = tmp_path / "python"
    monkeypatch.setattr(isolated.sys, "executable", str(slow))
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    for script, says in (
        ("exec sleep 30", "took more than 0.2 s"),
        ("kill -SEGV $$", "crashed while reading it (SIGSEGV)"),
    ):
        slow.write_text(f"#!/bin/sh\n{script}\n")
        slow.chmod(0o755)
        assert main(["lint", str(file)]) == 5
        assert says in capsys.readouterr().err


@pytest.mark.fault(29)
def test_a_file_that_takes_too_much_memory(tmp_path: Path) -> None:
    """Reading the file already exceeds the memory limit of the child."""
    file = tmp_path / "net.onnx"
    with file.open("wb") as sparse:
        sparse.truncate(400 << 20)
    program = (
        "import sys; from yolo_compress.lint import isolated, load; isolated.MEMORY_MIB = -4600 + 300; "
        "isolated.main([sys.argv[1], 'tensorrt'])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["error"] == "CorruptArtifact" and "took more than 500 MiB" in answer["message"]


def test_ab_checks_the_other_model_before_it_runs_it(tmp_path: Path) -> None:
    onnx.save(calling([["F0"]]), str(tmp_path / "net.onnx"))
    with pytest.raises(CorruptArtifact, match="calls itself"):
        open_contender(str(tmp_path / "net.onnx"), tmp_path)
