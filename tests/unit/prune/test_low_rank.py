"""Factorised models meet their budget, have only stock modules, and go through INT8, export and stock Ultralytics."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv

from tests.support.noise_set import noise_set
from tests.support.quant_net import NAMES, SIZE, images, net, run_onnx, run_torch
from tests.support.stage_schema import check as check_types
from tests.unit.prune.test_depth import batch, settled
from yolo_compress import pipeline
from yolo_compress.errors import CompressError, RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import FORMS, insert_qdq
from yolo_compress.export.torchscript import convert_to_int8
from yolo_compress.nets.factors import SCHEMES, is_factor, is_factorised
from yolo_compress.nets.families import check_prunable, flow_of
from yolo_compress.prune import budget, latency, low_rank
from yolo_compress.prune.budget import TOLERANCE
from yolo_compress.prune.cost import conv_macs, conv_shapes, parameters
from yolo_compress.prune.factorise import Factoriser
from yolo_compress.prune.graph import prunable
from yolo_compress.prune.low_rank import Candidate, FactorTimes, LowRank, places, uniform
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach, detach, read
from yolo_compress.quant.plan import plan as int8_plan
from yolo_compress.quant.ranges import fold
from yolo_compress.recipe import recipe
from yolo_compress.report.low_rank import is_recommended, low_rank_note
from yolo_compress.runtime.measure.layer_times import LAYERS, _by_layer
from yolo_compress.stages import _prune_plan
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint

HW = (64, 64)
FAMILIES = ("yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml")


class Case:
    def __init__(self, model, step=8, times=None):
        self.model, self.shapes = model, conv_shapes(model, HW)
        like = next(model.parameters()).dtype
        self.low_rank = LowRank(model, self.shapes, HW, step, 0.1, lambda: [batch(8).to(like)], times)

    def factorised(self, plan, refit=True):
        model = copy.deepcopy(self.model)
        self.low_rank.apply(model, plan, refit)
        return model


@pytest.fixture(scope="module")
def case():
    return Case(settled())


def everywhere(model, scheme):
    """Factorise each block that the scheme applies to, at full rank."""
    for block, place in places(model, HW, conv_shapes(model, HW)).items():
        if scheme in place.schemes():
            module, full = model.get_submodule(block), place.full_ranks(scheme)
            if scheme == "spatial":  # `full_ranks` ends where the factors cost as much as the block
                full = (place.kernel * min(place.shape.in_channels, place.shape.out_channels),)
            chain = low_rank.chain_of(module, scheme, Factoriser(module, None).factors(scheme, full))
            low_rank.replace_block(model, block, chain)
    return model


@pytest.mark.parametrize("yaml", [FAMILIES[0], *(pytest.param(yaml, marks=pytest.mark.slow) for yaml in FAMILIES[1:])])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_of_full_rank_is_the_model(yaml, scheme):
    model, x_BCHW = net(yaml=yaml).double(), images(2).double()
    factorised = everywhere(copy.deepcopy(model), scheme)
    changed = [name for name, module in factorised.named_modules() if is_factorised(module)]
    assert len(changed) > 15
    expected, got = model(x_BCHW)[0], factorised(x_BCHW)[0]
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()
    flow = flow_of(factorised, "quantise")
    for name in changed:
        *_, last = factorised.get_submodule(name).named_children()
        assert f"{name}.{last[0]}" in flow.root, "the output of the block is that of its last factor"


@pytest.mark.parametrize("yaml", FAMILIES)
def test_depthwise_grouped_and_output_convolutions_stay_whole(yaml):
    model = net(yaml=yaml)
    found = places(model, HW, conv_shapes(model, HW))
    flow = flow_of(model, "prune")
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            plain = conv.groups == 1 and name.endswith(".conv") and name in flow.reads and ".dfl." not in name
            assert (name.removesuffix(".conv") in found) == plain, name
    for place in found.values():
        conv = model.get_submodule(place.conv)
        assert place.in_hw[0] == place.out_hw[0] * conv.stride[0]


@pytest.mark.parametrize(
    ("make", "share"), [(budget.keep_flops, 0.7), (budget.keep_flops, 0.4), (budget.keep_params, 0.5)]
)
def test_a_budget_is_met(case, make, share):
    limit = make(case.shapes, share)
    case.low_rank.check(limit)
    plan = case.low_rank.plan(limit)
    assert limit.target * (1 - TOLERANCE) <= plan.cost <= limit.target
    model = case.factorised(plan)
    assert plan.macs_before == conv_macs(case.model, HW) and plan.macs_after == conv_macs(model, HW)
    assert (plan.parameters_before, plan.parameters_after) == (parameters(case.model), parameters(model))
    assert plan.cost == pytest.approx(
        {budget.keep_flops: plan.macs_after, budget.keep_params: plan.parameters_after}[make]
    )
    assert list(plan.macs) == list(case.shapes)
    assert {name for name, module in model.named_modules() if is_factorised(module)} == set(plan.chosen)
    for block, way in plan.chosen.items():
        *factors, _ = model.get_submodule(block)
        assert tuple(factor.conv.out_channels for factor in factors) == way.ranks, block
        assert all(rank % 8 == 0 and rank > 0 for rank in way.ranks), block
        whole = case.model.get_submodule(block).conv
        assert min(way.ranks) >= 0.1 * min(whole.in_channels, whole.out_channels)


def test_the_plan_has_the_errors_of_its_factors(case):
    plan = case.low_rank.plan(budget.keep_flops(case.shapes, 0.6))
    for block, way in plan.chosen.items():
        assert way.error == pytest.approx(float(case.low_rank._factorisers[block].errors(way.scheme)[way.ranks]))
    assert plan.error == pytest.approx(sum(way.error for way in plan.chosen.values()))


@pytest.mark.parametrize("seed", range(10))
def test_no_other_combination_is_better(seed):
    """Of 20,000 random combinations within the budget, none has less error."""
    random = np.random.default_rng(seed)
    options = {}
    for block in "abcdef":
        costs, weight, power = np.sort(random.uniform(0.2, 1, 40))[::-1], random.uniform(0.2, 5), random.uniform(1.2, 3)
        options[block] = [Candidate(None, (), 1.0, 0.0)] + [
            Candidate("mix", (rank,), float(cost), float(weight * (1 - cost) ** power))
            for rank, cost in enumerate(costs)
        ]
    limit = budget.Budget("keep_flops", lambda shapes: lambda o, i: 0.0, 3.5, 6.0)
    chosen = low_rank.choose(6.0, limit, options, 8)
    assert 3.5 * (1 - TOLERANCE) <= sum(way.cost for way in chosen.values()) <= 3.5
    others = [
        sum(way.error for way in ways)
        for ways in ([options[block][random.integers(41)] for block in options] for _ in range(20_000))
        if sum(way.cost for way in ways) <= 3.5
    ]
    assert len(others) > 1000 and sum(way.error for way in chosen.values()) <= min(others)


def test_refitting_helps_the_whole_model(case):
    plan, x_BCHW = case.low_rank.plan(budget.keep_flops(case.shapes, 0.6)), batch(8)
    raw = lambda model: model(x_BCHW)[1]["scores"].detach()  # noqa: E731
    whole = raw(case.model)
    errors = [float((raw(case.factorised(plan, refit)) - whole).square().mean()) for refit in (False, True)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("make", "share", "step", "message"),
    [
        (budget.keep_flops, 0.01, 8, "keep_flops=0.01 cannot be reached by low rank; the smallest is "),
        (budget.keep_params, 0.001, 8, "keep_params=0.001 cannot be reached by low rank; the smallest is "),
        (budget.keep_flops, 0.5, 512, "with ranks in steps of prune.round_to=512; set a smaller prune.round_to"),
    ],
)
def test_ranks_that_leave_nothing_are_refused(case, make, share, step, message):
    low = LowRank(case.model, case.shapes, HW, step, 0.1, tuple)
    with pytest.raises(RecipeError, match=message):
        low.check(make(case.shapes, share))


def test_a_budget_that_is_met_before_is_refused(case):
    limit = replace(budget.keep_flops(case.shapes, 0.5), target=2.0 * conv_macs(case.model, HW))
    with pytest.raises(
        RecipeError, match="is met before any convolution is factorised; with prune.then=low_rank, raise"
    ):
        case.low_rank.plan(limit)


def test_the_smallest_budget_is_reachable(case):
    with pytest.raises(RecipeError) as caught:
        case.low_rank.check(budget.keep_flops(case.shapes, 0.01))
    smallest = float(str(caught.value).split("the smallest is ")[1].split()[0])
    case.low_rank.check(budget.keep_flops(case.shapes, smallest))
    with pytest.raises(RecipeError, match="cannot be reached"):
        case.low_rank.check(budget.keep_flops(case.shapes, smallest - 0.001))


def test_a_factorised_model_is_not_pruned_again(case):
    model = case.factorised(case.low_rank.plan(budget.keep_flops(case.shapes, 0.6)), refit=False)
    for action in (check_prunable, prunable, lambda one: places(one, HW, {})):
        with pytest.raises(RecipeError, match="is factorised already"):
            action(model)
    for kind in ("channel", "low_rank"):
        with pytest.raises(RecipeError, match="is factorised already"):
            _prune_plan.check(recipe.PruneConfig(kind=kind), model, HW)


# --- latency ----------------------------------------------------------------------------------------------------------


def table_of(model, overhead, slow=()):
    """A table of layer times: 1 ms for a million MACs plus `overhead`, and 100 times that for factors of the blocks in `slow`."""
    shapes, layers = conv_shapes(model, HW), {}
    for name, shape in shapes.items():
        layers[name] = [[shape.macs * r, 1e-6 * (overhead + shape.macs * r)] for r in (1.0, 0.1)]
    for block, place in places(model, HW, shapes).items():
        for scheme in place.schemes():
            for name, shape in place.factors(scheme, place.full_ranks(scheme)).items():
                k = 1e-4 if block in slow else 1e-6
                layers[name] = [[shape.macs * r, k * (overhead + shape.macs * r)] for r in (1.0, 0.1)]
    rest = [[0.0, 0.0]] * (len(latency.WIDTHS) + 3)
    whole = sum(layers[name][0][1] for name in shapes)
    return {"schema": 1, "runtime": "onnxruntime", "precision": "fp32", "imgsz": list(HW), "threads": None, "device": {},
            "whole_ms": whole, "layers": layers, "rest": rest}  # fmt: skip


def test_only_what_the_table_calls_faster_is_factorised(case):
    names = list(case.low_rank.places)
    slow = names[1::2]
    table = table_of(case.model, 100.0, slow)
    times = latency.factor_times(table)
    assert times.scale == pytest.approx(1.0)
    limit = budget.latency_ms(case.shapes, latency.without_factors(table), 0.75 * table["whole_ms"])
    low = LowRank(case.model, case.shapes, HW, 8, 0.1, lambda: [batch(8)], times)
    plan = low.plan(limit)
    assert plan.chosen and not set(plan.chosen) & set(slow)
    assert limit.target * (1 - TOLERANCE) <= plan.cost <= limit.target
    model = copy.deepcopy(case.model)
    low.apply(model, plan, False)
    ms = sum(times.ms(name, shape) for name, shape in conv_shapes(model, HW).items())
    assert plan.cost == pytest.approx(ms)
    for block, way in plan.chosen.items():
        place = low.places[block]
        factors = place.factors(way.scheme, way.ranks)
        assert sum(times.ms(*one) for one in factors.items()) < times.ms(place.conv, place.shape)


def test_a_runtime_on_which_factors_are_slower_is_refused(case):
    table = table_of(case.model, 1e9)  # every further convolution costs more than all MACs
    low = LowRank(case.model, case.shapes, HW, 8, 0.1, tuple, latency.factor_times(table))
    limit = budget.latency_ms(case.shapes, latency.without_factors(table), 0.75 * table["whole_ms"])
    with pytest.raises(RecipeError, match="no factorised convolution of this model is faster than the whole one"):
        low.check(limit)


def test_a_table_for_channels_alone_is_refused(case):
    table = latency.without_factors(table_of(case.model, 1.0))
    with pytest.raises(RecipeError, match="the table has no layer .*mix0.conv: write the models again"):
        LowRank(case.model, case.shapes, HW, 8, 0.1, tuple, FactorTimes(table, 1.0))


def test_a_table_with_factors_serves_channels_too(case, tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table_of(case.model, 100.0)))
    for kind in ("channel", "low_rank"):
        limit = 0.8 * table_of(case.model, 100.0)["whole_ms"]
        _prune_plan.check(recipe.PruneConfig(kind=kind, latency_ms=limit, latency_table=str(file)), case.model, HW)


@pytest.mark.slow
def test_the_probe_has_each_scheme_at_each_share(tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank, "SHARES", (1.0, 0.5))
    monkeypatch.setattr(latency, "WIDTHS", (1.0, 0.5))
    model = net()
    latency.write_probe(model, tmp_path, HW, NAMES, 8, factors=True)
    described = json.loads((tmp_path / LAYERS).read_text())
    files = [one["file"] for one in described["networks"]]
    assert files == [
        "100.onnx",
        "050.onnx",
        *(f"{scheme}-{share}.onnx" for scheme in SCHEMES for share in ("100", "050")),
    ]
    for place in places(model, HW, conv_shapes(model, HW)).values():
        assert place.conv in described["nodes"]
        for scheme in place.schemes():
            assert set(place.factors(scheme, place.full_ranks(scheme))) <= set(described["nodes"])
    for one in described["networks"]:
        factorised = one["file"].split("-")[0] in SCHEMES
        assert all(is_factor(name) == factorised for name in one["macs"]), (
            "whole convolutions are timed in whole models"
        )
        nodes = {node.name: 1.0 for node in onnx.load(str(tmp_path / one["file"])).graph.node if node.op_type == "Conv"}
        owners = _by_layer(nodes, described["nodes"])
        convs = [name for name in one["macs"] if ".dfl." not in name]
        assert all(owners[name] == 1.0 for name in convs), "each convolution has a node of its own"


# --- INT8 and export --------------------------------------------------------------------------------------------------


def small(scheme, yaml="yolov8n.yaml", share=0.5):
    model = net(yaml=yaml)
    uniform(model, places(model, SIZE, conv_shapes(model, SIZE)), scheme, share, 8)
    model.train()
    with torch.no_grad():
        model(images(8))  # the statistics of BatchNorm fit again, as after re-estimation
    return model.eval()


@pytest.mark.parametrize("yaml", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_int8_plan_has_every_factor_and_the_tensors_between(yaml, scheme):
    model = small(scheme, yaml)
    placed = int8_plan(model)
    flow = flow_of(model, "quantise")
    for name, module in model.named_modules():
        if not is_factorised(module) or f"{name}.{scheme}0.conv" not in flow.reads:
            continue
        parts = [f"{name}.{child}" for child, _ in module.named_children()]
        for before, after in pairwise(parts):
            assert placed.reads[f"{after}.conv"] == before, "a factor reads the output of the factor before"
            if f"{after}.conv" in placed.convs:
                assert before in placed.tensors
                assert placed.group_of(before).tensors == (before,), "a tensor between factors has a scale of its own"
    whole = int8_plan(net(yaml=yaml))
    floats = {name.rpartition(".")[0] for name, _ in whole.skipped}
    made = [name for name in model.state_dict() if is_factor(name) and name.endswith(".conv.weight")]
    for name in made:
        block = ".".join(part for part in name.split(".")[:-2] if not is_factor(part))
        conv = name.removesuffix(".weight")
        if conv in placed.reads:
            assert (conv in placed.convs) == (block not in floats), name


def assert_equal_floats(got, expected):
    """A model with random weights amplifies rounding: boxes in px, then scores."""
    assert np.abs(got[:, :4] - expected[:, :4]).max() < 0.1 and np.abs(got[:, 4:] - expected[:, 4:]).max() < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_files_of_factorised_models(scheme, tmp_path):
    model, batch_BCHW = small(scheme), images(16, seed=3)
    file = tmp_path / "fp32.onnx"
    export_onnx(model, file, SIZE, names=NAMES)
    assert_equal_floats(run_onnx(file, batch_BCHW), run_torch(model, batch_BCHW))
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    for form in FORMS:
        counts = insert_qdq(file, tmp_path / f"{form}.onnx", state, form)
        assert counts.convs == len(int8_plan(model).convs)
    fused = copy.deepcopy(model).fuse(verbose=False)
    expected_float = run_torch(fused, batch_BCHW)
    attach(fused, state)
    expected = run_torch(fused, batch_BCHW)
    got = run_onnx(tmp_path / "tensorrt10.onnx", batch_BCHW)
    # twice as many INT8 tensors as in a whole model: more images have a value on the border of two codes
    difference, rounding = np.abs(got - expected)[:, 4:], np.abs(expected - expected_float)[:, 4:]
    assert np.sort(difference.mean((1, 2)))[1] < 1e-5, "images without such a value are equal"
    assert difference.mean() < 0.5 * rounding.mean()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantisers_come_off_again(scheme):
    model = small(scheme)
    before = {name: type(module) for name, module in model.named_modules()}
    state = ptq(model, lambda: [images(4)], "max")
    attach(model, state)
    assert read(model).activations == pytest.approx(dict(state.activations))
    detach(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.filterwarnings(r"ignore:torch\.quantize_per_tensor.* deprecated:UserWarning")
def test_int8_torchscript_takes_factors():
    model = small("tucker")
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    fused, batch_BCHW = copy.deepcopy(model).fuse(verbose=False), images(4, seed=3)
    expected_float = run_torch(fused, batch_BCHW)
    quantised = copy.deepcopy(fused)
    attach(quantised, state)
    expected = run_torch(quantised, batch_BCHW)
    with torch.no_grad():
        convert_to_int8(fused, state)
    got = run_torch(fused, batch_BCHW)
    assert np.abs(got - expected).mean() < np.abs(expected_float - expected).mean()


# --- stock Ultralytics ------------------------------------------------------------------------------------------------

STOCK = """
import json, sys
import numpy as np
import torch
from ultralytics import YOLO
model = YOLO("small.pt")
image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
found = model.predict(image, imgsz=64, conf=0.001, verbose=False, device="cpu")[0].boxes.data.tolist()
scores = model.val(data="set.yaml", imgsz=64, batch=1, plots=False, verbose=False, device="cpu", workers=0).results_dict
file = YOLO("small.pt").export(format="onnx", imgsz=64, simplify=False, verbose=False)
foreign = sorted({type(m).__module__ for m in YOLO("small.pt").model.modules()
                  if not type(m).__module__.startswith(("torch.", "ultralytics."))})
assert "yolo_compress" not in sys.modules
print(json.dumps({"found": found, "scores": scores, "file": str(file), "foreign": foreign}))
"""


@pytest.mark.slow
def test_stock_ultralytics_loads_predicts_validates_and_exports(tmp_path):
    """In a process without this package, with SAFE_LOAD: the numbers are those of the model here."""
    schemes = ("mix", "spatial", "tucker", "reduce")
    mixed = net()
    found = places(mixed, SIZE, conv_shapes(mixed, SIZE))
    for number, (block, place) in enumerate(found.items()):
        scheme = schemes[number % 4] if place.kernel > 1 else "mix"
        uniform(mixed, {block: place}, scheme, 0.5, 8)
    model = checkpoint.dress(mixed.eval(), NAMES)
    checkpoint.save_model(model, tmp_path / "small.pt")
    noise_set(tmp_path, train=2, val=4, names=NAMES, size_hw=(64, 64))
    (tmp_path / "set.yaml").write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [{', '.join(NAMES)}]\n"
    )
    environment = {
        **os.environ, "ULTRALYTICS_SAFE_LOAD": "1", "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false",
        "YOLO_CONFIG_DIR": str(tmp_path), "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STOCK],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["foreign"] == [] and all(np.isfinite(list(told["scores"].values())))
    loaded = checkpoint.load_model(tmp_path / "small.pt")
    x = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    x_BCHW = torch.from_numpy(x[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    expected = run_torch(model, x_BCHW)
    assert np.array_equal(run_torch(loaded, x_BCHW), expected)
    best = max(row[4] for row in told["found"])
    assert best == pytest.approx(expected[0, 4:].max(), abs=1e-4)
    assert_equal_floats(run_onnx(tmp_path / told["file"], x_BCHW), expected)
    export_onnx(loaded, tmp_path / "ours.onnx", SIZE, names=NAMES)
    assert_equal_floats(run_onnx(tmp_path / "ours.onnx", x_BCHW), expected)


def test_a_checkpoint_keeps_the_factors(case, tmp_path):
    plan = case.low_rank.plan(budget.keep_flops(case.shapes, 0.6))
    model = checkpoint.dress(case.factorised(plan), ["a", "b"])
    checkpoint.save_model(model, tmp_path / "small.pt")
    loaded = checkpoint.load_model(tmp_path / "small.pt")
    assert checkpoint.widths(loaded) == checkpoint.widths(model)
    stock = {type(module) for module in case.model.modules()} | {nn.Sequential, nn.Identity}
    assert {type(module) for module in loaded.modules()} <= stock
    assert all(type(part) is Conv for block in plan.chosen for part in loaded.get_submodule(block))


# --- the stage --------------------------------------------------------------------------------------------------------


def chosen(**sections):
    usual = {
        "data": {"yaml": "set.yaml", "imgsz": list(HW)},
        "baseline": {"weights": "whole.pt"},
        "prune": {"kind": "low_rank", "keep_flops": 0.6, "epochs": 1, "batch": 2, "close_mosaic": 0, "round_to": 8},
    }
    if "prune" in sections:
        sections["prune"] = {**usual["prune"], **sections["prune"]}
        sections["prune"] = {key: value for key, value in sections["prune"].items() if value is not None}
    Path("r.yaml").write_text(json.dumps({**usual, **sections}))
    return recipe.load(Path("r.yaml"))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise_set(tmp_path, train=4, val=2)
    checkpoint.save_model(checkpoint.dress(settled().float(), ["bolt", "nut"]), tmp_path / "whole.pt")
    return tmp_path


def check_pruned(pruned, planned, kept):
    metrics, model = pruned.metrics, checkpoint.load_model(pruned.file("model.pt"))
    assert metrics["kept_flops"] == pytest.approx(kept, rel=TOLERANCE)
    assert metrics["kept_flops"] == pytest.approx(metrics["compute_gflops"] / planned["gflops"][0], rel=1e-6)
    assert planned["gflops"][1] == pytest.approx(metrics["compute_gflops"], rel=0.01)
    factorised = {name for name, module in model.named_modules() if is_factorised(module)}
    assert set(metrics["low_rank"]["factors"]) == factorised and factorised
    assert metrics["low_rank"]["recommended"] is False and metrics["low_rank"]["runtime"] is None
    assert "flops.json" in check_types(pruned)
    macs = json.loads(pruned.file("flops.json").read_text())
    assert sum(after for _, after in macs.values()) == conv_macs(model, HW)
    assert "Low rank: " in planned["table"] and "GFLOPs at 64x64" in planned["table"]
    return model


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stage_factorises_trains_distils_and_quantises(shop):
    distill = {"epochs": 1, "batch": 2, "close_mosaic": 0, "layers": ["model.4", "model.15"], "feature_weight": 1.0}
    chain, store = chosen(distill=distill, qat={"epochs": 0}), Store(Path("weights"))
    planned = pipeline.dry_run(chain, store)
    pruned = pipeline.run(chain, "prune", store=store)
    model = check_pruned(pruned, planned, 0.6)
    assert "channels.json" not in pruned.manifest.files and planned["widths"] == {}
    student = checkpoint.load_model(pipeline.run(chain, "distill", store=store).file("model.pt"))
    assert checkpoint.widths(student) == checkpoint.widths(model)
    quantised = pipeline.run(chain, "qat", store=store)
    assert quantised.metrics["quantised_convs"] == len(int8_plan(student).convs)
    with pytest.raises(RecipeError, match="is factorised already"):
        pipeline.run(chosen(baseline={"weights": str(pruned.file("model.pt"))}), "prune", store=store)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stage_factorises_after_removing_channels(shop):
    chain = chosen(prune={"kind": "channel", "then": "low_rank", "keep_flops": 0.5, "epochs": 0})
    store = Store(Path("weights"))
    planned = pipeline.dry_run(chain, store)
    pruned = pipeline.run(chain, "prune", store=store)
    model = check_pruned(pruned, planned, 0.5)
    widths = json.loads(pruned.file("channels.json").read_text())
    dense = checkpoint.load_model(Path("whole.pt"))
    assert widths.keys() == {group.name for group in prunable(dense)}
    assert any(after < before for before, after in widths.values())
    flow = flow_of(model, "prune")
    assert all(flow.widths[name] == after for name, (_, after) in widths.items()), (
        "factors keep the channels of the layer"
    )


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"keep_flops": 0.001}, "keep_flops=0.001 cannot be reached by low rank"),
        ({"round_to": 64, "keep_flops": 0.3}, "cannot be reached by low rank; the smallest is 0.708"),
        ({"kind": "channel", "then": "low_rank", "keep_flops": 0.01, "floor": 0.5}, "cannot be reached"),
        ({"kind": "channel", "then": "low_rank", "keep_flops": 0.14, "floor": 0.5, "then_share": 0.9}, "by low rank"),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_training(shop, prune, message):
    with pytest.raises(CompressError, match=message):
        pipeline.run(chosen(prune=prune), "prune", store=Store(Path("weights")))
    assert not list(Path("weights").glob("[!.]*/*")), "a stage began"


def figures(**changes):
    return {"factors": {"a": "mix 8"}, "convolutions": 3, "loss": 1.0, "channel_loss": 2.0, "runtime": "openvino",
            "recommended": True, **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "recommended", "words"),
    [
        (
            {},
            True,
            "its loss is 1.000, that of channel pruning for the same budget 2.000. It is recommended for OpenVINO",
        ),
        ({"channel_loss": 0.5}, False, "It is not recommended here: before fine-tuning, its loss is 1.000"),
        ({"channel_loss": 1.0}, False, "Set prune.kind=channel and prune.then=off."),
        ({"loss": float("nan")}, False, "It is not recommended here"),
        ({"runtime": None}, False, "It is not recommended yet: its time was not measured"),
        ({"runtime": None, "channel_loss": 0.5}, False, "It is not recommended here"),
        ({"channel_loss": None}, True, "Channel pruning alone cannot meet this budget. It is recommended for OpenVINO"),
    ],
)
def test_low_rank_is_recommended_only_where_it_wins_in_the_same_measured_time(changes, recommended, words):
    found = figures(**changes)
    assert is_recommended(found) is recommended
    assert words in low_rank_note(found)
    assert ("It is recommended" in low_rank_note(found)) is recommended
