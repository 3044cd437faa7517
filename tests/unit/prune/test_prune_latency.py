"""Pruning to a latency: the search converges on any machine whose latency grows with the widths."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from tests.support.typed import validate
from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.prune import latency
from yolo_compress.prune.budget import choose, latency_ms
from yolo_compress.prune.cost import conv_macs, conv_shapes
from yolo_compress.prune.graph import prunable
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.errors import EngineError
from yolo_compress.runtime.measure.layer_times import LAYERS, LayerTable, _by_layer, _in_turn, _require_own_node, take

HW = (64, 64)


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval()


class Machine(latency.Rig):
    """A simulated machine: latency is `law(share of the MACs)` times the 10 ms of the unpruned model. It builds nothing."""

    def __init__(self, law, disturbed=()):
        super().__init__(None, HW, ("a", "b"), "onnxruntime", "fp32")
        vars(self).update(law=law, disturbed=disturbed, calls=0)

    def build_model(self, model, name):
        return model

    def fastest_ms(self, engine):
        return 10.0

    def compare(self, engine, dense):
        vars(self)["calls"] += 1
        busy = 2.0 if self.calls in self.disturbed else 1.0  # other load slows both down
        return latency.Comparison(self.law(engine["share"]), busy * 10)


@pytest.fixture(scope="module")
def planner(nano):
    groups = prunable(nano)
    scores = {group.name: torch.arange(1.0, group.width + 1) for group in groups}
    shapes = conv_shapes(nano, HW)
    layers = {name: [[shape.macs * r, shape.macs * r * 1e-6] for r in (1, 0.1)] for name, shape in shapes.items()}
    table = {"whole_ms": 10.0, "layers": layers, "rest": [[0.0, 0.0], [1e9, 0.0]]}
    return lambda ms: choose(nano, groups, scores, latency_ms(shapes, table, ms), 8, shapes, scope="local")


def hit(planner, limit_ms, machine, monkeypatch, table_ms=10.0, said=None):
    """Call `latency.hit` without removing channels: a "model" is the share of the MACs that the last plan keeps."""
    last = {}

    def plan(ms):
        last["plan"] = planner(ms * 10.0 / table_ms)
        return last["plan"]

    say = (said if said is not None else []).append
    apply = lambda model, plan: model.update(share=plan.kept_flops)  # noqa: E731
    return latency.hit({}, plan, limit_ms, table_ms, machine, None, say, apply)


@pytest.mark.parametrize("law", [lambda m: 0.3 + 0.7 * m, lambda m: m**0.5, lambda m: 0.15 + 0.85 * m**2])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_limit_is_hit_on_machines_unlike_the_table(planner, law, share, monkeypatch):
    said = []
    found = hit(planner, 10 * share, Machine(law), monkeypatch, said=said)
    assert abs(found.measured_ms / (10 * share) - 1) <= latency.CLOSE_ENOUGH
    assert found.measured_ms == pytest.approx(10 * law(found.plan.kept_flops)) and 1 <= len(said) <= latency.TRIES
    assert planner(found.asked_ms).widths == found.plan.widths  # the plan of a resumed run


@pytest.mark.parametrize(("disturbed", "table_ms"), [((1,), 18.0), ((2,), 10.0), ((1, 2), 18.0)])
def test_a_busy_machine_does_not_move_the_limit(planner, disturbed, table_ms, monkeypatch):
    found = hit(planner, 6.5, Machine(lambda m: 0.3 + 0.7 * m, disturbed), monkeypatch, table_ms)
    assert found.unpruned_ms == 10.0
    assert 10 * (0.3 + 0.7 * found.plan.kept_flops) == pytest.approx(6.5, rel=latency.TOLERANCE)


def test_a_machine_that_gains_nothing_is_an_error(planner, monkeypatch):
    with pytest.raises(CompressError, match=r"latency_ms=5 was missed by 80% in 5 tries \(nearest 9\.00 ms"):
        hit(planner, 5.0, Machine(lambda m: 0.9), monkeypatch)


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_that_is_let_through_keeps_the_promise(planner, seed, monkeypatch):
    law, noise = lambda m: 0.2 + 0.8 * m, np.random.default_rng(seed)
    noisy = Machine(lambda m: law(m) * noise.normal(1, latency.SETTLED))
    found = hit(planner, 6.5, noisy, monkeypatch)
    assert 10 * law(found.plan.kept_flops) == pytest.approx(6.5, rel=latency.TOLERANCE)


def test_a_limit_that_is_met_on_an_idle_machine_is_refused(planner, monkeypatch):
    with pytest.raises(RecipeError, match="latency_ms=15 is already met: the unpruned model takes 10 ms"):
        hit(planner, 15.0, Machine(lambda m: 0.3 + 0.7 * m), monkeypatch, table_ms=30.0)


def test_a_table_from_a_busy_machine_is_used_relatively(planner, monkeypatch):
    said = []
    found = hit(planner, 6.5, Machine(lambda m: m), monkeypatch, table_ms=400.0, said=said)
    assert found.plan.kept_flops == pytest.approx(0.65, rel=0.02) and len(said) == 1


class Launches:
    """A fake `measure_in_turn`: the model takes 0.6 of the 10 ms of the unpruned model.

    `slow(launch, round)` returns the factors by which the two are slowed down.
    """

    def __init__(self, monkeypatch, slow):
        self.slow, self.count = slow, 0
        monkeypatch.setattr(latency, "measure_in_turn", self)

    def __call__(self, specs, rounds, samples):
        pairs = [self.slow(self.count, number) for number in range(rounds)]
        self.count += 1
        return [{"rounds_ms": [[ms * pair[i]] * samples for pair in pairs]} for i, ms in enumerate((6.0, 10.0))]

    def compare(self):
        rig = latency.Rig(None, HW, ("a", "b"), "onnxruntime", "fp32")
        return rig.compare(Path("candidate"), Path("dense"))


def test_the_quietest_round_of_all_launches_counts(monkeypatch):
    launches = Launches(monkeypatch, lambda launch, number: (1.0 if (launch, number) == (3, 2) else 2.5, 1.0))
    rig = latency.Rig(None, HW, ("a", "b"), "onnxruntime", "fp32")
    assert rig.fastest_ms(Path("dense")) == 6.0 and launches.count == latency.LAUNCHES[0]


def test_a_quiet_machine_needs_the_fewest_launches(monkeypatch):
    launches = Launches(monkeypatch, lambda launch, number: (1.0, 1.0))
    assert launches.compare() == latency.Comparison(pytest.approx(0.6), 10.0)
    assert launches.count == latency.LAUNCHES[0]


@pytest.mark.parametrize(
    "slow",
    [
        lambda launch, number: (3.0, 3.0) if launch or number else (1.0, 1.0),  # other load in all rounds but one
        lambda launch, number: (1.0 + number, 1.0 + number),  # drifts
        lambda launch, number: (4.0, 1.0) if number == 2 else (1.0, 4.0) if number == 5 else (1.0, 1.0),  # bursts
        lambda launch, number: (1.5, 1.0) if launch == 1 else (1.0, 1.0),  # threads of one process badly placed
        lambda launch, number: (1.0, 1.0) if launch == 0 and number == 0 else (3.0, 3.0 if launch else 1.0),
    ],
)
def test_other_load_does_not_change_the_share(monkeypatch, slow):
    assert Launches(monkeypatch, slow).compare() == latency.Comparison(pytest.approx(0.6), 10.0)


def test_launches_that_disagree_are_repeated_up_to_a_limit(monkeypatch):
    launches = Launches(monkeypatch, lambda launch, number: (1.0 + 0.1 * (launch % 3 - 1), 1.0))
    assert launches.compare().share == pytest.approx(0.6)
    assert launches.count == latency.LAUNCHES[1]


def test_the_error_of_a_median_is_that_of_normal_noise():
    generator = np.random.default_rng(0)
    ratios = generator.normal(0.6, 0.03, (400, 201))
    assert np.median([latency._standard_error(row) for row in ratios]) == pytest.approx(
        np.median(ratios, 1).std() / 0.6, rel=0.1
    )


@pytest.fixture(scope="module")
def probe(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    latency.write_probe(nano, folder, HW, ("a", "b"), round_to=16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_int8_probe_is_timed_in_int8(nano, tmp_path, runtime, monkeypatch):
    for name, value in (("PROFILED_RUNS", 3), ("TIMED_RUNS", 3), ("ROUNDS", 1)):
        monkeypatch.setattr(f"yolo_compress.runtime.measure.layer_times.{name}", value)
    monkeypatch.setattr(latency, "WIDTHS", (1.0, 0.5))
    latency.write_probe(nano, tmp_path / "probe", HW, ("a", "b"), 16, runtime, "int8")
    table = take(tmp_path / "probe", runtime, "int8", threads=1)
    shapes = conv_shapes(nano, HW)
    timed = [name for name in shapes if all(ms > 0 for _, ms in table["layers"][name])]
    assert len(timed) >= 0.9 * len(shapes) and table["precision"] == "int8"
    rig = latency.Rig(tmp_path, HW, ("a", "b"), runtime, "int8")
    with open_engine(rig.build_model(nano, "candidate"), threads=1) as engine:
        assert engine.executed.startswith("int8 (57 int8, 6 fp32")


@pytest.mark.slow
def test_the_probe_prices_every_convolution_at_every_width(nano, probe):
    described = json.loads((probe / LAYERS).read_text())
    shapes = conv_shapes(nano, HW)
    assert set(described["nodes"]) == set(shapes)
    macs = [sum(network["macs"].values()) for network in described["networks"]]
    assert macs[0] == conv_macs(nano, HW) and macs == sorted(macs, reverse=True) and macs[-1] < 0.2 * macs[0]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_table_times_every_layer(nano, probe, runtime, monkeypatch):
    for name, value in (("PROFILED_RUNS", 3), ("TIMED_RUNS", 3), ("ROUNDS", 1)):
        monkeypatch.setattr(f"yolo_compress.runtime.measure.layer_times.{name}", value)
    table = take(probe, runtime, "fp32", threads=1)
    validate(table, LayerTable)
    shapes = conv_shapes(nano, HW)
    timed = [name for name in shapes if all(ms > 0 for _, ms in table["layers"][name])]
    assert len(timed) >= 0.9 * len(shapes)  # a library may fuse a small layer into another
    assert next(macs for macs, _ in table["layers"]["model.0.conv"]) == shapes["model.0.conv"].macs
    assert table["whole_ms"] > 0 and all(ms > 0 for _, ms in table["rest"])
    latency_ms(shapes, table, 0.5 * table["whole_ms"])


def test_nodes_go_to_the_longest_name_that_they_hold():
    convs = {"a": "/m.1/", "b": "/m.1/cv1/", "c": "/m.2/Conv"}
    nodes = {"/m.1/cv1/conv/Conv_nchwc": 1.0, "/m.1/act/Mul": 2.0, "/m.2/Conv + PWN(/m.2/Sigmoid)": 4.0, "Reorder": 8.0}
    assert _by_layer(nodes, convs) == {"a": 2.0, "b": 1.0, "c": 4.0, "": 8.0}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["/m.1/conv/Conv_nchwc", "/m.2/conv/Conv + PWN(/m.2/act/Mul)", "Reorder"], None),
        (
            ["images_abcd_/m.1/conv/Conv", "/m.1/conv/Conv", "/m.1/conv/Conv_abcd_/m.2/conv/Conv", "/m.2/conv/Conv"],
            None,
        ),
        (
            ["/m.1/conv/Conv", "fused_12"],
            r"int8: none of 2 timed nodes is b \(/m\.2/conv/Conv\) alone, and none names it",
        ),
        (["/m.1/conv/Conv || /m.2/conv/Conv"], r"is a .* alone, it is fused into /m\.1/conv/Conv \|\| /m\.2/conv/Conv"),
    ],
)
def test_a_convolution_without_a_node_of_its_own_is_named(nodes, message):
    convs = {"a": "/m.1/conv/Conv", "b": "/m.2/conv/Conv"}
    if message is None:
        return _require_own_node(dict.fromkeys(nodes, 1.0), convs, "int8")
    with pytest.raises(EngineError, match=message):
        _require_own_node(dict.fromkeys(nodes, 1.0), convs, "int8")


def test_the_least_of_all_rounds_counts(monkeypatch):
    """A library may number nodes differently at every load. The names of the first load are used."""
    found = iter([{"a": 3.0, "tmp_1": 1.0}, {"b": 9.0}, {"a": 2.0, "tmp_7": 1.0}, {"b": 5.0}, {"a": 40.0}, {"b": 6.0}])

    class Engine:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        node_ms = lambda self, runs: next(found)  # noqa: E731

    monkeypatch.setattr("yolo_compress.runtime.measure.layer_times.open_engine", lambda path, threads: Engine())
    assert _in_turn([Path("one"), Path("two")], None) == [{"a": 2.0, "tmp_1": 1.0}, {"b": 5.0}]


PROBE = {"networks": [{"file": "1.onnx", "macs": {"a": 1}}], "nodes": {"a": "/a"}, "imgsz": [64, 64]}


@pytest.mark.parametrize(
    "change",
    [{"nodes": None}, {"nodes": {}}, {"nodes": {"a": 1}}, {"networks": []}, {"networks": [1]}, {"networks": [{"file": "1.onnx"}]},
     {"networks": [{"file": 1, "macs": {}}]}, {"networks": [{"file": "1.onnx", "macs": {"a": "x"}}]}, {"imgsz": 64},
     {"networks": [{"file": "1.onnx", "macs": {"a": 1}, "precision": "int4"}]}, {"convs": ["a"]}],
)  # fmt: skip
def test_a_probe_of_another_form_is_refused(tmp_path, change):
    (tmp_path / LAYERS).write_text(json.dumps({**PROBE, **change}))
    with pytest.raises(EngineError, match="no readable layers.json"):
        take(tmp_path, "onnxruntime", "fp32")
    (tmp_path / LAYERS).write_text(json.dumps(PROBE))
    with pytest.raises(EngineError, match="no such ONNX file"):
        take(tmp_path, "onnxruntime", "fp32")


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2, "whole_ms": 1, "layers": {"a": 1}, "rest": [1]}', "[1]"])
def test_a_file_that_is_no_table_is_corrupt(tmp_path, text):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(CorruptArtifact, match="not a table of layer times|not usable JSON|expected a mapping"):
        latency.read_table(file, HW)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"prune\.latency_table: no file .*none\.json"):
        latency.read_table(tmp_path / "none.json", HW)


def test_a_table_at_another_size_is_refused(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(
        json.dumps({"schema": 1, "whole_ms": 1, "layers": {"a": [[1, 1]]}, "rest": [[1, 1]], "imgsz": [640, 640]})
    )
    with pytest.raises(RecipeError, match=r"measured at \[640, 640\], the recipe has \[64, 64\]"):
        latency.read_table(file, HW)
