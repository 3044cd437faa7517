"""Each rule of lint fires on a graph made for it and is silent on its twin; on whole networks the counts are those known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lint_graphs import Net
from onnx import TensorProto, helper

from yolo_compress.quant.lint.check import RULES, check
from yolo_compress.quant.lint.rule import SEVERITIES, WHOLE
from yolo_compress.quant.lint.targets import RUNTIMES

F16, BF16 = TensorProto.FLOAT16, TensorProto.BFLOAT16


def sound(opset: int = 17, size: tuple = (1, 3, 32, 32), **pair: object) -> Net:
    """Two INT8 convolutions and a float head, nothing wrong for TensorRT up to 10; `pair` changes the second Q/DQ."""
    net = Net(opset, size)
    return net.head(net.int8_conv(net.pair(net.stem(), **pair), "second"))


def second(**weight: object) -> Net:
    net = Net()
    return net.head(net.int8_conv(net.pair(net.stem()), "second", **weight))


# One function a graph, named after what is wrong or right in it.


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
    """Two INT8 branches, a concat of codes, an INT8 convolution."""
    net = Net()
    a = net.int8_conv(net.pair(net.stem()), "a")
    b = net.int8_conv("feature_DQ", "b")
    net.op("Concat", [net.pair(a, left), net.pair(b, right)], "cat", axis=1)
    return net.head(net.int8_conv(net.pair("cat", out), "last", into=64))


def residual(how: str, scale: float = 0.1) -> Net:
    """x + conv(x): "float", "residual" (as NVIDIA wants it), "branch" (the wrong side), "both"."""
    net = Net()
    x = net.pair(net.stem())
    branch = net.int8_conv(x, "branch")
    if how in ("branch", "both"):
        branch = net.pair(branch, scale)
    net.op("Add", [x if how in ("residual", "both") else "feature", branch], "add")
    return net.head(net.int8_conv(net.pair("add"), "last"))


def parallel(quantised: bool) -> Net:
    """conv(x) + conv(x): neither side is the residual one."""
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
    """A float tensor that Q reads, and a Relu: as it is, or through the pair."""
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
    """Boxes and scores joined: "plain", "quantised" as one, "half", "half, decoded in float"."""
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
        warnings.simplefilter("ignore", RuntimeWarning)  # the overflow is what is wanted
        net.constant("w", np.full((5, 3, 1, 1), weight), kind, type=type)
    return net.ends(net.conv("images", "head", weight="w"))


def half_between() -> Net:
    """INT8 convolution whose output is float16 by type, at opset 19."""
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
    return net.ends("odd")


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


T = "tensorrt"
Row = tuple[Callable[[], Net], Callable[[], Net], str, list[str]]
# rule -> graph with the fault, the same without, target, nodes found
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
        (lambda: wide(32, 24), lambda: wide(48, 16), T, ["second"]),  # its reader computes in float
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
    "checker": [(unknown_attribute, plain, "openvino", [WHOLE])],
    "operator": [
        (lambda: with_op("DynamicQuantizeLinear"), lambda: with_op("Relu"), T, ["odd"]),
        (lambda: with_op("QLinearAdd", "com.microsoft"), lambda: with_op("Relu"), "tensorrt-8.6", ["odd"]),
        (lambda: with_op("EfficientNMS_TRT"), lambda: with_op("Relu"), "onnxruntime", ["odd"]),
        (lambda: with_op("EfficientNMS_ONNX_TRT"), lambda: with_op("Relu"), "tensorrt-10.16", ["odd"]),
        (lambda: with_op("Mod", opset=13, inputs=("feature", "feature")), plain, "tensorrt-8.2", ["odd"]),
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


def test_every_rule_has_a_case_and_says_what_to_do() -> None:
    assert set(CASES) == set(RULES) and len(RULES) == len({rule.find for rule in RULES.values()})
    for name, rule in RULES.items():
        assert rule.id == name == name.lower() and len(name) < 22 and rule.severity in SEVERITIES
        assert rule.consequence.endswith(".") and rule.fix.endswith(".") and set(rule.runtimes) <= set(RUNTIMES)
