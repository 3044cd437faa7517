"""Groups in float equal a plan without them. The choice is tested on values for which the best set is known."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn

from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, net, run_onnx, run_torch
from yolo_compress.errors import CompressError, EnvironmentLacks, NumericsError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.lint.check import check
from yolo_compress.quant import sensitivity
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach, in_float
from yolo_compress.quant.plan import Group, plan
from yolo_compress.quant.ranges import QuantState, fold
from yolo_compress.recipe.sections import QatConfig
from yolo_compress.stages import _float_cost, qat

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def state() -> QuantState:
    return ptq(net(), lambda: [images(2)], "max")


@pytest.mark.parametrize("name", ["images", "model.2.cv1", "model.6.cv2", "model.22.cv3.1.0"])
def test_a_group_in_float_is_the_net_planned_without_it(state: QuantState, name: str) -> None:
    model, batch = net(), images(2, seed=3)
    attach(model, state)
    whole = run_torch(model, batch)
    group = plan(model).group_of(name)
    with in_float(model, [group]):
        got = run_torch(model, batch)
    assert np.array_equal(run_torch(model, batch), whole) and not np.array_equal(got, whole)
    part = net()
    attach(part, state.without([group]))
    assert np.array_equal(run_torch(part, batch), got)
    assert state.without([group]) == ptq(net(), lambda: [images(2)], "max", left=[name])


def test_all_groups_in_float_is_the_float_net(state: QuantState) -> None:
    model, batch = net(), images(2, seed=3)
    expected = run_torch(model, batch)
    attach(model, state)
    with in_float(model, plan(model).int8):
        assert np.array_equal(run_torch(model, batch), expected)


def test_the_graph_has_the_group_in_float_and_computes_what_torch_does(state: QuantState, tmp_path: Path) -> None:
    model, batch = net(), images(16, seed=3)
    left = [plan(model).group_of("model.4.cv2"), plan(model).group_of("images")]
    export_onnx(model, tmp_path / "fp32.onnx", SIZE, names=NAMES)
    part = fold(state.without(left), model)
    counts = insert_qdq(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", part, "tensorrt10")
    assert counts.convs == 57 - 4  # the first; and 5, 15.cv1, 18.cv1
    report = check(tmp_path / "int8.onnx", "tensorrt-10.3")
    assert report.count("error") == 0 and "mixed-readers" not in report.rules
    names = {
        node.input[0] for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node if node.op_type == "QuantizeLinear"
    }
    assert "images" not in names and "/model.14/Concat_output_0" not in names and "/model.11/Concat_output_0" in names
    fused = net().fuse(verbose=False)
    as_float = run_torch(fused, batch)
    attach(fused, part)
    expected = run_torch(fused, batch)
    assert_equal_but_for_ties(run_onnx(tmp_path / "int8.onnx", batch), expected, as_float)


def test_measurement_goes_on_where_it_stopped(state: QuantState) -> None:
    model = net()
    attach(model, state)
    placed = plan(model)
    names = [group.name for group in placed.int8]
    done = dict.fromkeys(names[:-2], 1.0)
    seen: list[int] = []
    found = sensitivity.measure(model, placed, lambda _: float(len(seen)), done, lambda: seen.append(1))
    assert list(found) == names and [found[name] for name in names[-2:]] == [0.0, 1.0] and len(seen) == 2
    with pytest.raises(NumericsError, match=rf"{names[-1]} in float"):
        sensitivity.measure(model, placed, lambda _: float("nan"), {name: 0.0 for name in names[:-1]}, lambda: None)


class Additive:
    """A model whose value is 1 in INT8 plus or minus the gain of each group in float."""

    def __init__(self, gains: dict[str, float], sign: float) -> None:
        self.gains, self.sign, self.off = gains, sign, list[str]()

    def __call__(self, model: nn.Module) -> float:
        return 1.0 + self.sign * sum(self.gains[name] for name in self.off)

    @contextmanager
    def in_float(self, model: nn.Module, groups: Iterable[Group]) -> Iterator[None]:
        self.off = [group.name for group in groups]
        yield
        self.off = []


@pytest.mark.parametrize("better", [True, False])
def test_the_cheapest_set_that_is_enough(monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    placed = plan(net())
    names = [group.name for group in placed.int8]
    gains: dict[str, float] = dict.fromkeys(names, 0.0) | {
        names[3]: 0.30,
        names[5]: 0.20,
        names[7]: 0.05,
        names[9]: -0.1,
    }
    _float_cost: dict[str, float] = dict.fromkeys(names, 1.0) | {names[3]: 10.0, names[5]: 2.0, names[7]: 0.1}
    sign = 1.0 if better else -1.0
    net_ = Additive(gains, sign)
    monkeypatch.setattr(sensitivity, "in_float", net_.in_float)
    alone = {name: 1.0 + sign * gain for name, gain in gains.items()}

    def chosen(need: float) -> tuple[set[str], Any]:
        left, value = sensitivity.choose(
            nn.Identity(), placed, alone, _float_cost, net_, 1.0, 1.0 + sign * need, better
        )
        return set(left), value

    assert chosen(0.0) == (set(), 1.0)
    assert chosen(0.04)[0] == {names[7]}
    assert chosen(0.2)[0] == {names[5]}, "the small one, chosen first, is not needed with it"
    assert chosen(0.5)[0] == {names[3], names[5]}
    everything, value = chosen(9.0)
    assert everything == {names[3], names[5], names[7]}, "a group without gain stays INT8"
    assert value == pytest.approx(1.0 + sign * 0.55)


def test_the_price_is_what_the_convolutions_lose() -> None:
    placed = plan(net())
    times: dict[str, tuple[float, float]] = {name: (2.0, 2.5) for name in placed.reads}  # INT8 gains nothing
    group = placed.group_of("model.4.cv2")
    assert group.convs == ("model.5.conv", "model.15.cv1.conv", "model.18.cv1.conv")
    times |= {"model.5.conv": (3.0, 1.0), "model.15.cv1.conv": (0.75, 0.5), "model.18.cv1.conv": (0.1, 0.2)}
    _float_cost = sensitivity.price_ms(placed, times)
    assert _float_cost.pop(group.name) == pytest.approx(2.0 + 0.25 - 0.1)
    assert set(_float_cost) == {one.name for one in placed.int8} - {group.name}
    assert set(_float_cost.values()) == {sensitivity.RESOLUTION_MS}
    del times["model.5.conv"]
    with pytest.raises(CompressError, match=r"model\.5\.conv of the plan are not among the 63 timed convolutions"):
        sensitivity.price_ms(placed, times)


@pytest.mark.parametrize("better", [True, False])
def test_of_two_that_give_back_alike_the_cheap_one_stays_float(monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    """The choice depends on the cost, so it can differ between runtimes."""
    placed = plan(net())
    first, second = placed.int8[3], placed.int8[5]
    sign = 1.0 if better else -1.0
    net_ = Additive(
        dict.fromkeys((group.name for group in placed.int8), 0.0) | {first.name: 0.2, second.name: 0.2}, sign
    )
    monkeypatch.setattr(sensitivity, "in_float", net_.in_float)
    alone = {name: 1.0 + sign * gain for name, gain in net_.gains.items()}
    for dear, cheap in ((first, second), (second, first)):
        times: dict[str, tuple[float, float]] = {name: (1.0, 0.9) for name in placed.reads}
        times |= {name: (5.0, 1.0) for name in dear.convs} | {name: (1.1, 1.0) for name in cheap.convs}
        _float_cost = sensitivity.price_ms(placed, times)
        assert _float_cost[dear.name] > _float_cost[cheap.name]
        args = (nn.Identity(), placed, alone, _float_cost, net_, 1.0, 1.0 + sign * 0.15, better)
        assert sensitivity.choose(*args)[0] == (cheap.name,)


def test_a_killed_stage_keeps_the_times_that_it_took(
    state: QuantState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are measured once and kept, even if the machine is slower after the restart."""
    model, timed, calls = net(), list[str](), list[int]()
    placed = plan(model)

    def times(job: Any, model: nn.Module, state: QuantState, runtime: str) -> dict[str, tuple[float, float]]:
        timed.append(runtime)
        return {name: (2.0 + len(timed), 1.0) for name in placed.reads}

    def value(job: Any, images: Any, model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return 1.0 if len(calls) == 1 else 1.5

    monkeypatch.setattr(qat._float_cost, "layer_ms", times)
    monkeypatch.setitem(qat.MEASURES, "loss", value)
    config = QatConfig(sensitivity="loss", sensitivity_price="openvino")
    job: Any = SimpleNamespace(config=config, work=tmp_path, out=tmp_path, imgsz_hw=SIZE)
    with pytest.raises(KeyboardInterrupt):
        qat._sensitivity(job, model, state, [], ())
    left, metrics = qat._sensitivity(job, model, state, [], ())
    assert timed == ["openvino"] and len(calls) == 10 + len(placed.int8) - 7
    assert left == () and metrics == {"sensitivity_enough": False, "float_price_ms": 0}
    rows = list(csv.DictReader((tmp_path / "sensitivity.csv").read_text().splitlines()))[2:]
    convs = {group.name: [name for name in group.convs if name in placed.convs] for group in placed.int8}
    assert {row["group"]: float(row["price_ms"]) for row in rows} == {
        name: pytest.approx(2.0 * len(own)) for name, own in convs.items()
    }
    assert all(float(row["compute_gflops"]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_times_every_int8_convolution_twice(state: QuantState, tmp_path: Path, runtime: Any) -> None:
    job: Any = SimpleNamespace(work=tmp_path, imgsz_hw=SIZE, dataset=SimpleNamespace(names=NAMES))
    model = net()
    times = _float_cost.layer_ms(job, model, state, runtime)
    placed = plan(model)
    assert set(placed.convs) <= set(times) and all(min(times[name]) > 0 for name in placed.convs)
    assert set(sensitivity.price_ms(placed, times)) == {group.name for group in placed.int8}


def test_a_runtime_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_compress.runtime.backends.openvino.OpenVINOBackend.probe", lambda: "pip install openvino")
    with pytest.raises(EnvironmentLacks, match=r"qat\.sensitivity_price=openvino: pip install openvino"):
        _float_cost.check("openvino")
    _float_cost.check("gflops")


def test_rows_put_first_what_gives_back_most() -> None:
    found = {"measure": "loss", "float": 1.0, "int8": 2.0, "groups": {"a": 1.9, "b": 1.2}, "left": ["b"],
             "compute_gflops": {"a": 1.0, "b": 2.0}}  # fmt: skip
    rows = sensitivity.rows(found)
    assert (
        "price_ms" not in rows[2]
        and sensitivity.rows(found | {"price_ms": {"a": 0.5, "b": 0.25}})[2]["price_ms"] == 0.25
    )
    assert [row["group"] for row in rows] == ["all float", "all int8", "b", "a"]
    assert rows[2]["gives_back"] == pytest.approx(0.8) and rows[2]["float"] and not rows[3]["float"]
