"""INT8 graphs have the planned Q/DQ nodes, the outputs of the fake-quantised model, and types that the runtime supports."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, net, run_onnx, run_torch
from yolo_compress.errors import CorruptArtifact, RecipeError
from yolo_compress.export import qdq
from yolo_compress.export.activations import check_int8
from yolo_compress.export.calibration_cache import write_cache
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.qdq import FORMS, insert_qdq
from yolo_compress.lint.check import check
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach
from yolo_compress.quant.ranges import QuantState, fold

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES = 58  # tensors that the plan quantises where they are computed
# 13 concatenations, 8 chunks with two halves, 3 pools, 2 upsamplings
PASSED = 13 + 2 * 8 + 3 + 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantState]:
    file, model = tmp_path_factory.mktemp("qdq") / "fp32.onnx", net()
    export_onnx(model, file, SIZE, names=NAMES)
    return file, fold(ptq(model, lambda: [images(4)], "max"), model)


def initializers(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in graph.initializer}


@pytest.mark.fault(40)
@pytest.mark.parametrize("target", list(FORMS))
def test_nodes_are_the_plan(source: tuple[Path, QuantState], tmp_path: Path, target: str) -> None:
    file, state = source
    counts = insert_qdq(file, tmp_path / "int8.onnx", state, target)
    model = onnx.load(str(tmp_path / "int8.onnx"))
    kinds = Counter(node.op_type for node in model.graph.node)
    pairs = SOURCES + (0 if target == "openvino" else PASSED)
    assert (counts.convs, counts.activations) == (57, pairs)
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (pairs + counts.outputs, pairs + counts.outputs + 57)
    assert (counts.outputs > 0) == (target == "onnxruntime")
    assert model.opset_import[0].version == 17
    assert {item.key: item.value for item in model.metadata_props}["precision"] == "int8"
    made = {name: node for node in model.graph.node for name in node.output}
    values = initializers(model.graph)
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in made:
            feature, weight = made[node.input[0]], made[node.input[1]]
            while target == "openvino" and feature.op_type in qdq.FORWARDING:
                feature = made[feature.input[0]]
            assert feature.op_type == weight.op_type == "DequantizeLinear"
            codes, scale_C, zero_C = (values[name] for name in weight.input)
            assert codes.dtype == zero_C.dtype == np.int8 and not zero_C.any()
            assert scale_C.shape == zero_C.shape == (len(codes),) and scale_C.min() > 0
            assert weight.attribute[0].name == "axis" and weight.attribute[0].i == 0
            fullest = np.abs(codes.astype(int)).max(axis=(1, 2, 3))  # of every channel
            assert fullest.min() == fullest.max() == state.weight_qmax
            assert len(node.input) == 3 and values[node.input[2]].dtype == np.float32  # no INT32 bias
    wanted = {
        "tensorrt10": (np.int8, {0}),
        "tensorrt11": (np.int8, {0}),
        "onnxruntime": (np.uint8, {0, 128}),
        "openvino": (np.uint8, {128}),
    }[target]
    zeros = [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    inside = {
        node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0].endswith("/Conv_output_0")
    }
    zeros = [
        values[node.input[2]]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in inside  # `before_silu` chooses those
    ]
    assert {zero.dtype for zero in zeros} == {np.dtype(wanted[0])} and {int(zero) for zero in zeros} == wanted[1]
    assert all(item.data_type != TensorProto.INT32 for item in model.graph.initializer)


def test_graph_computes_what_the_fake_quantised_network_computes(
    source: tuple[Path, QuantState], tmp_path: Path
) -> None:
    file, state = source
    insert_qdq(file, tmp_path / "int8.onnx", state, "tensorrt10")
    model, batch = net().fuse(verbose=False), images(16, seed=3)
    expected_float = run_torch(model, batch)
    attach(model, state)
    expected, got = run_torch(model, batch), run_onnx(tmp_path / "int8.onnx", batch)
    assert_equal_but_for_ties(got, expected, expected_float)


def test_each_convolution_fed_alike_computes_alike(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """With equal inputs per layer, only the rounding ties of one layer remain."""
    file, state = source
    insert_qdq(file, tmp_path / "int8.onnx", state, "tensorrt10")
    graph = onnx.load(str(tmp_path / "int8.onnx"))
    made = {name: node for node in graph.graph.node for name in node.output}
    ends = {}  # convolution -> its input behind DQ, its output
    for node in graph.graph.node:
        if node.op_type == "Conv" and node.input[1].endswith(".weight_dequantized"):
            assert made[node.input[0]].op_type == "DequantizeLinear"
            ends[node.input[1].removesuffix(".weight_dequantized")] = (node.input[0], node.output[0])
    batch = images(1, seed=3)
    names = sorted({name for pair in ends.values() for name in pair})
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen = dict(zip(names, session.run(names, {"images": batch.numpy()}), strict=True))
    model = net().fuse(verbose=False)
    attach(model, state)
    assert set(ends) == set(state.convs)
    for name, (into, out) in ends.items():
        with torch.no_grad():
            expected = model.get_submodule(name)(torch.from_numpy(seen[into])).numpy()
        error = np.abs(seen[out] - expected) / np.abs(expected).max()
        assert error.max() < 0.01 and (error > 1e-4).mean() < 0.05, name


def test_signed_and_unsigned_codes_give_equal_values(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """INT8 with zero point 0 and UINT8 with zero point 128 represent the same values."""
    file, state = source
    plain = replace(state, outputs={})
    targets: tuple[str, ...] = ("tensorrt10", "onnxruntime", "openvino")
    for target in targets:
        insert_qdq(file, tmp_path / f"{target}.onnx", plain, target)
    results = [run_onnx(tmp_path / f"{target}.onnx", images(2, seed=3)) for target in targets]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


@pytest.mark.parametrize("bits", [7, 8])
def test_every_form_holds_the_codes_that_training_saw(
    source: tuple[Path, QuantState], tmp_path: Path, bits: int
) -> None:
    """In 7 bits 255 * 63 * 2 fits 16 bits, in which x86 without VNNI adds two products; 255 * 127 * 2 does not."""
    file, state = source
    state, model = replace(state, weight_bits=bits), net().fuse(verbose=False)
    attach(model, state)
    for target in FORMS:
        insert_qdq(file, tmp_path / "int8.onnx", state, target)
        values = initializers(onnx.load(str(tmp_path / "int8.onnx")).graph)
        largest = []
        for name, amax_C in state.weights.items():
            conv = model.get_submodule(name)
            trained = conv.weight_quantizer(conv._parameters["weight"]).detach().numpy()
            scale_C = np.float32(amax_C) / np.float32(state.weight_qmax)
            codes = values[f"{name}.weight_quantized"]
            assert np.array_equal(codes, np.rint(trained / scale_C.reshape(-1, 1, 1, 1))), (target, name)
            assert np.allclose(
                values[f"{name}.weight_scale"], scale_C, rtol=1e-2 if target == "tensorrt11" else 0, atol=1e-7
            )
            largest.append(int(np.abs(codes.astype(int)).max()))
        assert set(largest) == {63 if bits == 7 else 127}


@pytest.mark.parametrize("target", list(FORMS))
def test_sums_concats_and_pools_read_and_give_codes_of_one_scale(
    source: tuple[Path, QuantState], tmp_path: Path, target: str
) -> None:
    file, state = source
    insert_qdq(file, tmp_path / "int8.onnx", state, target)
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    made = {name: node for node in graph.node for name in node.output}
    read_by: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node)
    values = initializers(graph)

    def pairs_before(name: str) -> list[onnx.NodeProto]:
        node = made[name]
        if FORMS[target].forwarding_pairs or node.op_type not in qdq.FORWARDING:
            return [node]
        return [
            pair for part in (node.input if node.op_type == "Concat" else node.input[:1]) for pair in pairs_before(part)
        ]

    backbone_and_neck = [node for node in graph.node if "/model.22/" not in node.name]
    seen: Counter[str] = Counter()
    for node in backbone_and_neck:
        if node.op_type not in ("Add", "Concat", "MaxPool", "Resize", "Split"):
            continue
        seen[node.op_type] += 1
        parts = node.input if node.op_type in ("Add", "Concat") else node.input[:1]
        sources = [pair for name in parts for pair in pairs_before(name)]
        assert all(one.op_type == "DequantizeLinear" for one in sources), node.name
        readers = [reader for name in node.output for reader in read_by[name]]
        quantised = FORMS[target].forwarding_pairs or node.op_type == "Add"
        assert {one.op_type == "QuantizeLinear" for one in readers} == {quantised}, node.name
        readers = readers if quantised else []
        scales = {float(values[one.input[1]]) for one in (*sources, *readers)}
        zeros = {int(values[one.input[2]]) for one in (*sources, *readers)}
        assert len(scales) == len(zeros) == 1, node.name
    assert seen == {"Add": 6, "Concat": 13, "MaxPool": 3, "Resize": 2, "Split": 8}
    for name in made:  # no tensor is read both as INT8 and as float
        readers = read_by.get(name, [])
        kinds = {reader.op_type == "QuantizeLinear" for reader in readers}
        inner = {reader.op_type for reader in readers} == {"Sigmoid", "Mul"}
        assert len(kinds) <= 1 or inner, name


def test_ranges_reach_the_tensors_they_are_named_after(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """If one group has twice the range, exactly the pairs of its tensors and of layers that forward them double their scale."""
    file, state = source
    group = ("model.6.cv2", "model.9.cv2", "model.19")  # concats 11 and 20
    wide = {name: amax * (1 + (name in group)) for name, amax in state.activations.items()}
    scales = []
    for name, ranges in (("a", state.activations), ("b", wide)):
        insert_qdq(file, tmp_path / name, replace(state, activations=ranges), "tensorrt10")
        graph = onnx.load(str(tmp_path / name)).graph
        values = initializers(graph)
        scales.append({n.input[0]: float(values[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear"})
    changed = {name for name, scale in scales[1].items() if scale != scales[0][name]}
    assert all(scales[1][name] == pytest.approx(2 * scales[0][name]) for name in changed)
    blocks = {"/model.6/cv2/act/Mul_output_0", "/model.9/cv2/act/Mul_output_0", "/model.19/act/Mul_output_0"}
    joins = {"/model.10/Resize_output_0", "/model.11/Concat_output_0", "/model.20/Concat_output_0"}
    assert changed == blocks | joins
    unequal = {**state.activations, "model.19": 2 * state.activations["model.19"]}
    with pytest.raises(CorruptArtifact, match=r"/model\.20/Concat joins tensors with ranges"):
        insert_qdq(file, tmp_path / "c", replace(state, activations=unequal), "tensorrt10")


def test_same_inputs_same_bytes(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    file, state = source
    for name in "ab":
        insert_qdq(file, tmp_path / name, state, "onnxruntime")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_open_batch_runs(tmp_path: Path) -> None:
    model, batch = net(), images(3, seed=3)
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=NAMES, dynamic_batch=True)
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", state, "tensorrt10")
    together = run_onnx(tmp_path / "int8.onnx", batch)
    assert np.allclose(together[1:2], run_onnx(tmp_path / "int8.onnx", batch[1:2]), atol=0.05)


@pytest.mark.fault(40)
def test_graph_and_state_must_belong_together(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    file, state = source
    out = tmp_path / "int8.onnx"
    with pytest.raises(
        RecipeError, match="'dla' is unknown, expected one of onnxruntime, openvino, tensorrt10, tensorrt11"
    ):
        insert_qdq(file, out, state, "dla")  # type: ignore[arg-type]
    with pytest.raises(CorruptArtifact, match="not folded"):
        insert_qdq(file, out, replace(state, folded=False), "tensorrt10")
    for more in (
        {"activations": {**state.activations, "model.99": 1.0}},
        {"weights": {**state.weights, "model.99.conv": (1.0,)}},
    ):
        with pytest.raises(CorruptArtifact, match=r"model\.99\.conv: 0 convolutions"):
            insert_qdq(file, out, replace(state, **more), "tensorrt10")  # type: ignore[arg-type]
    short = {**state.weights, "model.1.conv": state.weights["model.1.conv"][1:]}
    with pytest.raises(CorruptArtifact, match=r"model\.1\.conv: 32 output channels.*31"):
        insert_qdq(file, out, replace(state, weights=short), "tensorrt10")
    model = onnx.load(str(file))
    model.opset_import[0].version = 12
    onnx.save(model, str(tmp_path / "old.onnx"))
    with pytest.raises(CorruptArtifact, match="opset 12"):
        insert_qdq(tmp_path / "old.onnx", out, state, "tensorrt10")
    assert not out.exists()


def test_two_layers_with_one_weight_are_refused(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """The exporter stores equal tensors once; their names would then be lost."""
    model = net()
    model.model[2].m[0].cv2.conv.weight.data.copy_(model.model[2].m[0].cv1.conv.weight.data)
    model.model[2].m[0].cv2.bn.load_state_dict(model.model[2].m[0].cv1.bn.state_dict())
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=NAMES)
    with pytest.raises(CorruptArtifact, match="computed, not stored"), torch.no_grad():
        insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", source[1], "tensorrt10")


def test_calibration_cache_holds_the_scales_of_the_qdq_form(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    file, state = source
    count = write_cache(file, tmp_path / "int8.cache", state, version="10300")
    head, *lines = (tmp_path / "int8.cache").read_text().splitlines()
    assert head == "TRT-10300-EntropyCalibration2" and len(lines) == count == 92 + 57 + 57
    scales = {name: struct.unpack(">f", bytes.fromhex(code))[0] for name, code in (line.split(": ") for line in lines)}
    insert_qdq(file, tmp_path / "int8.onnx", state, "tensorrt10")
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    values = initializers(graph)
    paired = {node.input[0]: float(values[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"}
    assert {name: scales[name] for name in paired} == paired
    assert scales["/model.0/conv/Conv_output_0"] == pytest.approx(state.outputs["model.0.conv"] / 127)
    assert scales["/model.0/act/Sigmoid_output_0"] == pytest.approx(1 / 127)
    names = {name for node in onnx.load(str(file)).graph.node for name in node.output} | {"images"}
    assert set(scales) <= names


def test_half_typed_codes_are_the_same_network(source: tuple[Path, QuantState], tmp_path: Path) -> None:
    """Every float tensor between INT8 layers is float16. Every scale is exact in float16 and not below the float32 scale."""
    _, state = source
    export_onnx(net(), tmp_path / "fp32.onnx", SIZE, names=NAMES, opset=19)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", state, "tensorrt10")
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "typed.onnx", state, "tensorrt11")
    to_fp16(tmp_path / "typed.onnx", tmp_path / "half.onnx", "int8")
    model = onnx.load(str(tmp_path / "half.onnx"))
    assert {item.key: item.value for item in model.metadata_props}["precision"] == "int8"
    half = initializers(model.graph)
    exact = initializers(onnx.load(str(tmp_path / "int8.onnx")).graph)
    scales = [name for name in exact if name.endswith("_scale")]
    assert len(scales) == 92 + 57
    for name in scales:
        halved = half[f"{name}_fp16"]
        assert halved.dtype == np.float16 and (halved > 0).all()
        assert (halved >= exact[name]).all() and (halved <= exact[name] * (1 + 2**-10) + 6e-8).all(), name
    report = check(tmp_path / "half.onnx", "tensorrt-11.4")
    assert (report.facts["int8_convs"], report.count("error"), report.count("warning")) == (57, 0, 0)
    batch = images(2, seed=3)
    as_float, expected = run_onnx(tmp_path / "fp32.onnx", batch[:1]), run_onnx(tmp_path / "int8.onnx", batch[:1])
    error, error_half = (
        np.abs(got - as_float).mean() for got in (expected, run_onnx(tmp_path / "half.onnx", batch[:1]))
    )
    assert error_half < 1.5 * error  # other rounding ties, which a model with random weights amplifies


ACTS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.1),
    nn.Hardswish(),
    nn.Mish(),
    nn.GELU(),
    nn.PReLU(),
    nn.Identity(),
    nn.Sigmoid(),
    nn.Tanh(),
]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
def test_activations_of_any_number_of_nodes_become_codes_behind_their_last(act: nn.Module, tmp_path: Path) -> None:
    model = net()
    for module in model.modules():
        if isinstance(getattr(module, "act", None), nn.SiLU):
            module.act = act
    check_int8(model, 17)
    expected_float = run_torch(model, images(4, seed=3))
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=NAMES)
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    counts = insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", state, "tensorrt10")
    assert (counts.convs, counts.activations) == (57, SOURCES + PASSED)
    insert_qdq(tmp_path / "fp32.onnx", tmp_path / "ort.onnx", state, "onnxruntime")
    for target in ("tensorrt-10.3", "openvino"):
        assert not check(tmp_path / "int8.onnx", target).count("error")
    model.fuse(verbose=False)
    attach(model, state)
    assert_equal_but_for_ties(
        run_onnx(tmp_path / "int8.onnx", images(4, seed=3)), run_torch(model, images(4, seed=3)), expected_float
    )
