"""A model without bottlenecks computes what the model does with their part of the next convolution's input set to 0."""

import copy
import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from tests.support.noise_set import noise_set
from tests.support.quant_net import NAMES, SIZE, assert_equal_but_for_ties, images, net, run_onnx, run_torch
from tests.support.random_norms import with_random_norms
from tests.unit.prune.test_budget import Table
from tests.unit.prune.test_graph import lively, random_keep, silenced
from yolo_compress import pipeline
from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.qdq import insert_qdq
from yolo_compress.prune import budget, depth
from yolo_compress.prune.budget import TOLERANCE, Plan, choose
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes, parameters
from yolo_compress.prune.criteria import scores
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.obs import obs
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach
from yolo_compress.quant.ranges import fold
from yolo_compress.recipe import recipe
from yolo_compress.stages import _prune_plan
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint

HW = (64, 64)
BACKBONE, NECK = "model.4", "model.15"


def deep_yaml(depth_multiple=0.67):
    """YOLOv8 with the depth of m (2 and 4 bottlenecks a layer) and the width of n."""
    return {**yaml_model_load("yolov8n.yaml"), "scale": "n", "scales": {"n": [depth_multiple, 0.25, 1024]}}


def deep(seed=0, depth_multiple=0.67):
    """A float64 model with random BatchNorms."""
    torch.manual_seed(seed)
    model = DetectionModel(deep_yaml(depth_multiple), nc=2, verbose=False).double().eval()
    return with_random_norms(model)


@torch.no_grad()
def settled(seed=0):
    """A model whose BatchNorms fit `batch(8)`, as those of a trained model fit its images. Moments are then well conditioned."""
    model = deep(seed).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(batch(8))
    return model.eval()


def batch(count=1, seed=0):
    return torch.rand(count, 3, *HW, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blind(model, counts):
    """The model whose `cv2` does not see the outputs of the bottlenecks that are to go. All bottlenecks still run."""
    dense = copy.deepcopy(model)
    for layer, count in counts.items():
        block = dense.get_submodule(layer)
        first = (2 + count) * block.c
        assert block.cv2.conv.in_channels == (2 + len(block.m)) * block.c
        with torch.no_grad():
            block.cv2.conv.weight[:, first:] = 0
    return dense


@torch.no_grad()
def same(one, other, images=None):
    images = batch() if images is None else images
    return (one(images)[0] - other(images)[0]).abs().max() < 1e-9


def test_the_bottlenecks_of_every_size_are_found():
    counts = {layer: len(chain.bottlenecks) for layer, chain in depth.chains(deep()).items()}
    assert list(counts.values()) == [2, 4, 4, 2, 2, 2, 2, 2]
    assert [len(chain.bottlenecks) for chain in depth.chains(lively()).values()] == [1, 2, 2, 1, 1, 1, 1, 1]
    chain = depth.chains(deep())[BACKBONE]
    assert chain.reader == "model.4.cv2.conv" and chain.ends == (64, 96, 128, 160, 192)
    assert chain.bottlenecks == tuple(f"model.4.m.{i}" for i in range(4))
    assert len(depth.chains(lively("n-p6"))) == 5, "C2 concatenates the last output only, so it is no such layer"
    assert set(depth.chains(lively(family="yolo11"))) == {f"model.{i}" for i in (2, 4, 6, 8, 13, 16, 19, 22)}


@pytest.mark.parametrize("layer", [BACKBONE, NECK])
def test_residual_and_plain_layers_without_their_last_bottlenecks_equal_a_blind_reader(layer):
    model = deep()
    assert model.get_submodule(layer).m[0].add == (layer == BACKBONE)
    for count in reversed(range(len(model.get_submodule(layer).m))):
        short = copy.deepcopy(model)
        depth.shorten(short, {layer: count})
        block = short.get_submodule(layer)
        assert type(block) is type(model.get_submodule(layer)) and type(block.m) is nn.ModuleList
        assert len(block.m) == count and block.cv2.conv.in_channels == (2 + count) * block.c
        assert block.np == sum(parameter.numel() for parameter in block.parameters())
        assert same(short, blind(model, {layer: count}))
        assert not same(short, model)


@pytest.mark.parametrize("build", [deep, lambda: lively("s", nc=2), lambda: lively(nc=2, family="yolo11")])
def test_bottlenecks_and_channels_together_equal_a_blind_and_silenced_model(build):
    model = build()
    found = depth.chains(model)
    counts = {layer: len(chain.bottlenecks) * (number % 3) // 2 if number % 3 < 2 else len(chain.bottlenecks)
              for number, (layer, chain) in enumerate(found.items())}  # fmt: skip
    short = copy.deepcopy(model)
    depth.shorten(short, counts)
    groups = prunable(short)
    keep = random_keep(groups, 3)
    dense = silenced(blind(model, counts), groups, keep)
    whole = Plan(keep, {}, {}, 0, 0, 0.0, {layer: (len(found[layer].bottlenecks), n) for layer, n in counts.items()})
    cut = copy.deepcopy(model)
    depth.remove(cut, whole)
    assert same(cut, dense)
    again = random_keep(prunable(cut), 4)  # prunable again
    expected = silenced(cut, prunable(cut), again)
    prune(cut, again)
    assert same(cut, expected)


def test_all_bottlenecks_can_go_and_then_there_are_none():
    model = deep()
    depth.shorten(model, dict.fromkeys(depth.chains(model), 0))
    assert depth.chains(model) == {} and len(prunable(model)) > 20
    with pytest.raises(
        RecipeError, match=r"no layer of this model has a bottleneck that can be removed; leave prune\.depth"
    ):
        depth.require_chains(model)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"model.4": 5}, "model.4 has 4 bottlenecks that can be removed, and 5 of them are to stay"),
        ({"model.4": -1}, "model.4 has 4 bottlenecks"),
        ({"model.5": 0, "model.1": 1}, "model.1 has 0 bottlenecks"),
    ],
)
def test_counts_out_of_range_change_nothing(counts, message):
    model = deep()
    with pytest.raises(RecipeError, match=message):
        depth.shorten(model, {"model.2": 0, **counts})
    assert len(model.model[2].m) == 2


def test_the_shapes_and_moments_of_the_shorter_model_need_no_new_run():
    model = deep()
    found, shapes = depth.chains(model), conv_shapes(model, HW)
    counts = {BACKBONE: 1, NECK: 0}
    evidence = Evidence(model, prunable(model), images=lambda: [batch(2)])
    short = copy.deepcopy(model)
    depth.shorten(short, counts)
    assert depth.remaining_shapes(shapes, found, counts) == conv_shapes(short, HW)
    own = Evidence(short, prunable(short), images=lambda: [batch(2)]).moments
    left = depth.remaining_moments(evidence.moments, found, counts)
    for layer in counts:  # later layers see another input, but the readers do not
        reader = found[layer].reader
        if layer == BACKBONE:
            assert torch.equal(own[reader].cov_CC, left[reader].cov_CC)
        assert own[reader].mean_C.shape == left[reader].mean_C.shape


@pytest.mark.parametrize("refitted", [True, False])
@pytest.mark.parametrize("layer", [BACKBONE, NECK])
@torch.no_grad()
def test_the_error_is_that_of_the_readers_output(layer, refitted):
    """Measured on the images, with the mean removed: without refitting, BatchNorm's new statistics restore the mean."""
    model = settled()
    evidence = Evidence(model, prunable(model), images=lambda: [batch(8)])
    chain = depth.chains(model)[layer]

    def output(of):
        found = []
        hook = of.get_submodule(chain.reader).register_forward_hook(lambda *given: found.append(given[2]))
        of(batch(8))
        hook.remove()
        flat_CN = found[0].transpose(0, 1).flatten(1)
        return flat_CN - flat_CN.mean(1, keepdim=True)

    before = output(model)
    errors = depth._Errors(model, evidence.moments, refitted)
    for count in range(len(chain.bottlenecks)):
        short = copy.deepcopy(model)
        depth.shorten(short, {layer: count}, evidence.moments if refitted else None)
        measured = float((output(short) - before).square().sum() / before.square().sum())
        assert errors.by_count(chain)[count] == pytest.approx(measured, rel=0.01)
    assert errors.by_count(chain)[-1] == 0.0


def planted(idle):
    """A model in which the reader hardly uses the last bottleneck of the layers `idle`."""
    model = settled().float()
    for layer in idle:
        block = model.get_submodule(layer)
        with torch.no_grad():
            block.cv2.conv.weight[:, -block.c :] *= 1e-4
    return model


class Case:
    """A planted model, its evidence, and the plan with depth."""

    def __init__(self, idle):
        self.model = planted(idle)
        self.evidence = Evidence(self.model, prunable(self.model), images=lambda: [batch(8).float()])
        self.importance = scores(self.evidence, obs)
        self.shapes = conv_shapes(self.model, HW)
        self.found = depth.chains(self.model)

    def plan(self, limit, scope="local"):
        def widths(groups, shapes, model=self.model):
            return choose(model, groups, self.importance, limit, 8, shapes, scope=scope)

        # `choose` reads kernel sizes from modules; those of the shorter model are the same
        counts = depth.search(self.model, self.evidence.moments, self.shapes, limit, widths, True)
        short = copy.deepcopy(self.model)
        depth.shorten(short, counts, self.evidence.moments)
        plan = widths(prunable(short), depth.remaining_shapes(self.shapes, self.found, counts), short)
        return depth.with_bottlenecks(plan, self.evidence.groups, self.shapes, self.found, counts)


@pytest.fixture(scope="module")
def case():
    return Case([BACKBONE, NECK])


@pytest.mark.parametrize(
    ("make", "share"), [(budget.keep_flops, 0.7), (budget.keep_flops, 0.35), (budget.keep_params, 0.5)]
)
def test_a_budget_is_met_and_idle_bottlenecks_go(case, make, share):
    limit = make(case.shapes, share)
    plan = case.plan(limit)
    for layer in (BACKBONE, NECK):
        before, after = plan.bottlenecks[layer]
        assert before == len(case.found[layer].bottlenecks) and after < before
    cut = copy.deepcopy(case.model)
    depth.remove(cut, plan, case.evidence.moments)
    assert {layer: len(cut.get_submodule(layer).m) for layer in plan.bottlenecks} == {
        layer: after for layer, (_, after) in plan.bottlenecks.items()
    }
    assert plan.macs_before == conv_macs(case.model, HW) and plan.macs_after == conv_macs(cut, HW)
    assert (plan.parameters_before, plan.parameters_after) == (parameters(case.model), parameters(cut))
    assert limit.target * (1 - TOLERANCE) <= plan.cost <= limit.target
    assert plan.cost == {budget.keep_flops: plan.macs_after, budget.keep_params: plan.parameters_after}[make]
    left = {group.name: group.width for group in prunable(cut)}
    assert left == {name: after for name, (_, after) in plan.widths.items() if after}
    assert {name for name, (_, after) in plan.widths.items() if not after} == {
        group.name for group in case.evidence.groups if group.name not in left
    }
    after = {name: shape.macs for name, shape in conv_shapes(cut, HW).items()}
    assert {name: macs for name, (_, macs) in plan.macs.items() if macs} == after
    assert list(plan.macs) == list(case.shapes)


def test_idle_bottlenecks_go_first_and_costly_errors_last(case):
    errors = depth._Errors(case.model, case.evidence.moments, True)
    steps = depth._order(case.found, case.shapes, budget.keep_flops(case.shapes, 0.5), errors)
    assert set(steps[:2]) == {BACKBONE, NECK}
    assert {layer: steps.count(layer) for layer in case.found} == {
        layer: len(chain.bottlenecks) for layer, chain in case.found.items()
    }


@pytest.mark.slow
def test_the_least_error_wins_over_all_depths(case, monkeypatch):
    """`search` looks at a coarse grid first; here it looks at every depth, and finds no better one."""
    limit = budget.keep_flops(case.shapes, 0.5)
    coarse = case.plan(limit).bottlenecks
    monkeypatch.setattr(depth, "COARSE", 1000)
    assert case.plan(limit).bottlenecks == coarse


@pytest.mark.slow
def test_a_bottleneck_that_the_reader_needs_stays(case):
    """The reader of one layer sees almost only its last bottleneck, so removing that costs nearly all of its output."""
    needy = Case([BACKBONE])
    with torch.no_grad():
        needy.model.get_submodule(NECK).cv2.conv.weight[:, : case.found[NECK].ends[-2]] *= 1e-3
    needy.evidence = Evidence(needy.model, prunable(needy.model), images=lambda: [batch(8).float()])
    plan = needy.plan(budget.keep_flops(needy.shapes, 0.7))
    assert plan.bottlenecks[NECK] == (2, 2) and plan.bottlenecks[BACKBONE][1] < 4
    assert case.plan(budget.keep_flops(case.shapes, 0.7)).bottlenecks[NECK][1] < 2


def test_a_latency_budget_prices_only_the_layers_that_are_left(case, factor=0.8):
    table = Table(case.model, factor)
    table.shapes = conv_shapes(case.model, HW)
    table.json["layers"] = {
        name: [[shape.macs * part, 0.01 + shape.macs * part * 1e-6] for part in (1.0, 0.5, 0.25, 0.06)]
        for name, shape in table.shapes.items()
    }
    root = sum(shape.macs for shape in table.shapes.values()) ** 0.5
    table.json["rest"] = [[root * part**0.5, root * part**0.5 * 1e-6] for part in (1.0, 0.5, 0.25, 0.06)]
    table.json["whole_ms"] = factor * table.ms(table.shapes)
    limit = budget.latency_ms(table.shapes, table.json, 0.6 * table.json["whole_ms"])
    plan = case.plan(limit)
    cut = copy.deepcopy(case.model)
    depth.remove(cut, plan)
    assert sum(after for _, after in plan.bottlenecks.values()) < 20
    assert plan.cost == pytest.approx(factor * table.ms(conv_shapes(cut, HW)), rel=1e-9)
    assert limit.target * (1 - TOLERANCE) <= plan.cost <= limit.target
    with pytest.raises(RecipeError, match=r"the model has no layer model\.\S+, so the table belongs to another model"):
        budget.latency_ms(conv_shapes(cut, HW), table.json, 0.1)


def test_where_a_layer_costs_the_same_at_any_width_milliseconds_take_more_bottlenecks_than_macs(case):
    """The reason for depth: at batch 1 a convolution has a fixed cost."""
    shapes = case.shapes
    table = {"whole_ms": float(len(shapes)), "rest": [[0.0, 0.0], [1e9, 0.0]],
             "layers": {name: [[shape.macs, 1.0], [0.0, 0.9]] for name, shape in shapes.items()}}  # fmt: skip
    by_ms = case.plan(budget.latency_ms(shapes, table, 0.75 * len(shapes)))
    with pytest.raises(RecipeError, match="cannot be reached"):
        choose(case.model, case.evidence.groups, case.importance, budget.latency_ms(shapes, table, 0.75 * len(shapes)),
               8, shapes)  # fmt: skip
    assert sum(after for _, after in by_ms.bottlenecks.values()) < 20


def test_a_budget_that_no_depth_allows_is_refused(case):
    with pytest.raises(RecipeError, match=r"keep_flops=0\.001 cannot be reached; the smallest is"):
        case.plan(budget.keep_flops(case.shapes, 0.001))


# --- the model afterwards -------------------------------------------------------------------------------------------


def test_the_checkpoint_has_stock_classes_and_loads_safely(tmp_path):
    model = checkpoint.dress(DetectionModel(deep_yaml(), nc=2, verbose=False).eval(), ["a", "b"])
    counts = {"model.2": 0, BACKBONE: 1, NECK: 0}
    depth.shorten(model, counts)
    checkpoint.save_model(model, tmp_path / "short.pt")
    loaded = checkpoint.load_model(tmp_path / "short.pt")  # refuses a class that is not of torch or Ultralytics
    assert {layer: len(loaded.get_submodule(layer).m) for layer in counts} == counts
    with torch.no_grad():
        assert torch.equal(loaded.eval()(batch().float())[0], model.eval()(batch().float())[0])
    from ultralytics.nn.tasks import load_checkpoint

    stock, _ = load_checkpoint(tmp_path / "short.pt")
    with torch.no_grad():
        assert torch.equal(stock(batch().float())[0], loaded(batch().float())[0])


@pytest.mark.usefixtures("one_thread")
def test_float_and_int8_files_compute_what_torch_computes(tmp_path):
    def short():
        model = net()
        depth.shorten(model, {"model.2": 0, BACKBONE: 1, "model.12": 0, NECK: 0})
        return model

    file = tmp_path / "fp32.onnx"
    export_onnx(short(), file, SIZE, names=NAMES)
    shown = images(16, seed=3)
    exact, expected, got = run_torch(short().double(), shown.double()), run_torch(short(), shown), run_onnx(file, shown)
    rounding = abs(expected - exact).max()  # px, of torch itself
    assert abs(got - expected).max() < max(1e-3, 5 * rounding) and rounding < 1e-3
    names = [node.name for node in onnx.load(str(file)).graph.node if node.op_type in ("Split", "Concat")]
    assert not any("/model.2/" in name or "/model.15/" in name for name in names), (
        "halves are not split and joined again"
    )
    assert any("/model.4/" in name for name in names)
    state = fold(ptq(short(), lambda: [images(4)], "max"), short())
    insert_qdq(file, tmp_path / "int8.onnx", state, "tensorrt10")
    model = short().fuse(verbose=False)
    expected_float = run_torch(model, shown)
    attach(model, state)
    assert_equal_but_for_ties(run_onnx(tmp_path / "int8.onnx", shown), run_torch(model, shown), expected_float)


# --- recipes and stages ---------------------------------------------------------------------------------------------


def chosen(**sections):
    usual = {
        "data": {"yaml": "set.yaml", "imgsz": 64},
        "baseline": {"weights": "deep.pt"},
        "prune": {
            "depth": True,
            "calib_images": 4,
            "epochs": 2,
            "rounds": 2,
            "batch": 2,
            "close_mosaic": 0,
            "round_to": 8,
        },
    }
    Path("r.yaml").write_text(json.dumps({**usual, **sections}))
    return recipe.load(Path("r.yaml"))


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise_set(tmp_path, train=4, val=2)
    model = checkpoint.dress(planted([BACKBONE, NECK]), ["bolt", "nut"])
    checkpoint.save_model(model, tmp_path / "deep.pt")
    return tmp_path


@pytest.mark.slow
def test_rounds_are_trained_taught_and_distilled_and_say_where_bottlenecks_went(shop):
    distill = {"epochs": 1, "batch": 2, "close_mosaic": 0, "layers": ["model.4", "model.15"], "feature_weight": 1.0}
    chain, store = chosen(distill=distill), Store(Path("weights"))
    planned = pipeline.dry_run(chain, store)
    pruned = pipeline.run(chain, "prune", store=store)
    metrics, counts = pruned.metrics, pruned.metrics["bottlenecks"]
    assert metrics["kept_flops"] == pytest.approx(0.5, rel=TOLERANCE)
    assert metrics["kept_flops"] == pytest.approx(metrics["compute_gflops"] / planned["gflops"][0], rel=1e-6)
    dense = checkpoint.load_model(Path("deep.pt"))
    model = checkpoint.load_model(pruned.file("model.pt"))
    assert counts == {layer: [len(dense.get_submodule(layer).m), len(model.get_submodule(layer).m)] for layer in counts}
    assert counts[BACKBONE][1] < 4 and counts[NECK][1] < 2
    widths, macs = (json.loads(pruned.file(name).read_text()) for name in ("channels.json", "flops.json"))
    assert set(widths) == {group.name for group in prunable(dense)} and widths["model.4.m.3.cv1"][1] == 0
    assert macs.keys() == conv_shapes(dense, HW).keys() and macs["model.4.m.3.cv2.conv"][1] == 0
    assert sum(after for _, after in macs.values()) == conv_macs(model, HW)
    assert planned["bottlenecks"].keys() == counts.keys() and "bottlenecks: 20 -> " in planned["table"]
    assert "model.4 4 -> " in planned["table"] and "0%" in planned["table"]
    student = pipeline.run(chain, "distill", store=store)
    after = checkpoint.load_model(student.file("model.pt"))
    assert {n: tuple(p.shape) for n, p in after.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }


def test_a_model_without_bottlenecks_and_a_budget_out_of_reach_are_refused_before_training(shop):
    def refused(config):
        with pytest.raises(RecipeError) as caught:
            pipeline.run(config, "prune", store=Store(Path("weights")))
        assert not list(Path("weights").glob("[!.]*/*")), "a stage began"
        return str(caught.value)

    assert "keep_flops=0.001 cannot be reached" in refused(chosen(prune={"depth": True, "keep_flops": 0.001}))
    bare = checkpoint.load_model(Path("deep.pt"))
    depth.shorten(bare, dict.fromkeys(depth.chains(bare), 0))
    checkpoint.save_model(bare, Path("deep.pt"))
    message = refused(chosen())
    assert message == "prune.depth: no layer of this model has a bottleneck that can be removed; leave prune.depth out"


def test_depth_reaches_smaller_budgets():
    """The preflight of a budget knows that bottlenecks can go too."""
    smallest = []
    for on in (False, True):
        config = recipe.PruneConfig(keep_flops=0.001, depth=on, floor=0.5)
        with pytest.raises(RecipeError, match="cannot be reached; the smallest is") as caught:
            _prune_plan.check(config, deep().float(), HW)
        smallest.append(float(str(caught.value).split("the smallest is ")[1].split()[0]))
    assert smallest[1] < 0.9 * smallest[0]
    within = sum(smallest) / 2
    _prune_plan.check(recipe.PruneConfig(keep_flops=within, depth=True, floor=0.5), deep().float(), HW)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("prune.kind", "unstructured")], "prune.depth=true has no effect with prune.kind=unstructured: leave it out"),
        ([("prune.sensitivity", "loss")], "prune.sensitivity=loss limits the loss of channels, not of bottlenecks"),
        (
            [("distill.layers", "[model.6.m.1]")],
            "distill.layers: prune.depth=true can remove model.6.m.1 from the student",
        ),
        ([("distill.layers", "[model.6.m.1=model.6]")], "name a whole layer, such as model.15"),
    ],
)
def test_settings_that_do_not_go_with_depth(overrides, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load("digits", [("prune.depth", "true"), *overrides])
    assert message in str(caught.value)


def test_a_teachers_bottleneck_may_be_tapped():
    loaded = recipe.load("digits", [("prune.depth", "true"), ("distill.layers", "[model.6=model.6.m.1]")])
    assert loaded.distill is not None and loaded.distill.layers == ("model.6=model.6.m.1",)
