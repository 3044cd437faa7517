"""The cost of a plan is exactly the cost of the model after its channels are removed, and it is within the budget."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets import detect
from yolo_compress.prune import budget
from yolo_compress.prune.budget import TOLERANCE, choose
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes, parameters
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable, prune

HW = (96, 160)  # not square: height and width must not be mixed up


class Case:
    """A model, its groups and its scores."""

    def __init__(self, name, nc=80):
        torch.manual_seed(0)
        self.model = DetectionModel(f"{name}.yaml", nc=nc, verbose=False).eval()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.1, 2.0)
        self.groups = prunable(self.model)
        self.scores = scores(Evidence(self.model, self.groups), find("bn_gamma"))

    def choose(self, keep_flops, round_to=8, scores=None, **options):
        shapes = conv_shapes(self.model, HW)
        limit = budget.keep_flops(shapes, keep_flops)
        return choose(self.model, self.groups, scores or self.scores, limit, round_to, shapes, **options)


@pytest.fixture(scope="module")
def cases():
    return {"n": Case("yolov8n"), "s": Case("yolov8s", nc=3), "11n": Case("yolo11n"), "26n": Case("yolo26n")}


@pytest.fixture(scope="module")
def nano(cases):
    return cases["n"]


def counted(model, hw):
    """Count MACs: every output pixel of a convolution reads each of its weights once."""
    total = 0
    model = copy.deepcopy(model)
    detect.deploy(model)

    def add(conv, _, output):
        nonlocal total
        total += conv.weight.numel() * output.shape[2] * output.shape[3]

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(1, 3, *hw))
    for hook in hooks:
        hook.remove()
    return total


def shares(plan):
    return {name: after / before for name, (before, after) in plan.widths.items()}


@pytest.mark.fault(32)
@pytest.mark.parametrize("size", ["n", "s", "11n", "26n"])
@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("round_to", [8, 32])
@pytest.mark.parametrize("keep_flops", [0.35, 0.5, 0.7, 0.9])
def test_budget_widths_and_floors(cases, size, scope, round_to, keep_flops):
    case = cases[size]
    if (size, round_to) == ("26n", 32):
        keep_flops = max(keep_flops, 0.36)  # its C3k blocks are so narrow that the smallest model has 0.359
    plan = case.choose(keep_flops, round_to, floor=0.1, scope=scope)
    assert keep_flops * (1 - TOLERANCE) <= plan.kept_flops <= keep_flops
    assert list(plan.widths) == list(plan.keep) == [group.name for group in case.groups]
    by_tie = {}
    for group in case.groups:
        before, after = plan.widths[group.name]
        unit = math.gcd(round_to, group.steps) * group.step  # round_to is a power of two
        assert before == group.width and after == len(plan.keep[group.name])
        assert after % unit == 0 and after >= max(unit, 0.1 * before)
        assert by_tie.setdefault(group.tie, after / group.step) == after / group.step


@pytest.mark.parametrize(
    ("size", "keep_flops", "scope"),
    [
        ("n", 0.3, "global"),
        ("n", 0.7, "local"),
        ("s", 0.5, "global"),
        ("11n", 0.2, "global"),
        ("11n", 0.6, "isomorphic"),
        ("26n", 0.5, "global"),
    ],
)
def test_the_plan_costs_what_it_says_after_surgery(cases, size, keep_flops, scope):
    case = cases[size]
    plan = case.choose(keep_flops, scope=scope)
    pruned = copy.deepcopy(case.model)
    prune(pruned, plan.keep)
    assert plan.macs_before == conv_macs(case.model, HW) == counted(case.model, HW)
    assert plan.macs_after == conv_macs(pruned, HW) == counted(pruned, HW)
    assert parameters(pruned) < parameters(case.model)
    assert {g.name: g.width for g in prunable(pruned)} == {name: after for name, (_, after) in plan.widths.items()}


@pytest.mark.parametrize("size", ["n", "11n", "26n"])
def test_a_pruned_model_has_a_budget_of_its_own(cases, size):
    case = copy.copy(cases[size])
    case.model = copy.deepcopy(case.model)
    prune(case.model, case.choose(0.6).keep)
    case.groups = prunable(case.model)
    case.scores = scores(Evidence(case.model, case.groups), find("l2"))
    plan = case.choose(0.8)
    assert plan.macs_before == conv_macs(case.model, HW)
    assert 0.8 * (1 - TOLERANCE) <= plan.kept_flops <= 0.8


@pytest.mark.parametrize("size", ["11n", "26n"])
def test_as_much_of_it_can_be_pruned_as_of_a_yolov8n(cases, size):
    def prunable_share(case):
        with pytest.raises(RecipeError, match="cannot be reached; the smallest is") as refused:
            case.choose(0.001)
        return 1 - float(str(refused.value).split("the smallest is ")[1].split()[0])

    assert prunable_share(cases[size]) >= 0.95 * prunable_share(cases["n"])


def test_parameters_are_those_of_the_deployed_model(cases):
    for case in cases.values():
        deployed = copy.deepcopy(case.model)
        detect.deploy(deployed)
        total = sum(parameter.numel() for parameter in deployed.parameters())
        assert parameters(case.model) == parameters(deployed) == total
        assert case.choose(0.5).parameters_before == total


def test_macs_of_one_convolution_by_hand():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2)

        def forward(self, x):
            return self.conv(x)

    assert conv_macs(Wrapped(), (8, 12)) == (4 * 6) * 6 * (4 // 2) * 3 * 5


def test_counting_leaves_the_model_alone(nano):
    calls = []
    handle = nano.model.model[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in nano.model.state_dict().items()}
    nano.choose(0.5)
    handle.remove()
    assert calls == [] and not nano.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in nano.model.state_dict().items())


def test_the_best_channels_of_each_group_stay(nano):
    plan = nano.choose(0.5)
    for name, keep in plan.keep.items():
        gone = torch.ones(len(nano.scores[name]), dtype=torch.bool)
        gone[keep] = False
        assert keep.tolist() == sorted(set(keep.tolist()))
        if gone.any():
            assert nano.scores[name][keep].min() >= nano.scores[name][gone].max()


def test_global_takes_the_least_important_group_first(nano):
    scored = {group.name: torch.ones(group.width) for group in nano.groups}
    scored["model.5"] = torch.linspace(0.001, 0.002, len(scored["model.5"]))
    plan = nano.choose(0.99, scores=scored, floor=0.25)
    assert plan.widths["model.5"] == (128, 88)
    assert {name for name, share in shares(plan).items() if share < 1} == {"model.5"}
    deeper = nano.choose(0.7, scores=scored, floor=0.25)
    assert deeper.widths["model.5"] == (128, 32)  # down to the floor, before the other groups lose more


def test_local_thins_all_groups_alike(nano):
    plan = nano.choose(0.5, 1, scope="local", floor=0)
    counts = [after / before for before, after in plan.widths.values() if before >= 64]
    assert max(counts) - min(counts) <= 2 / 64
    doubled = {name: 2**i * score for i, (name, score) in enumerate(nano.scores.items())}
    again = nano.choose(0.5, 1, scores={n: s / s.mean() for n, s in doubled.items()}, scope="local", floor=0)
    assert again.widths == plan.widths


@pytest.mark.fault(33)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_equal_scores_are_taken_evenly_and_always_the_same(nano, scope):
    ones = {group.name: torch.ones(group.width) for group in nano.groups}
    plan = nano.choose(0.5, 1, scores=ones, scope=scope, floor=0)
    again = nano.choose(0.5, 1, scores=dict(reversed(ones.items())), scope=scope, floor=0)
    assert plan.widths == again.widths
    assert all(torch.equal(plan.keep[name], again.keep[name]) for name in plan.keep)
    assert all(
        keep.tolist() == list(range(len(keep))) for keep in plan.keep.values()
    )  # of equal scores the first channels stay
    wide = [share for name, share in shares(plan).items() if plan.widths[name][0] >= 64]
    assert max(wide) - min(wide) <= 2 / 64


@pytest.mark.fault(32, 33)
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("outlier", [0.0, 1e9])
def test_a_layer_of_zeros_or_with_one_outlier_keeps_channels(nano, scope, outlier):
    """If all gammas of a layer are 0, or one is huge, no convolution loses all channels. Of equal channels the first stay."""
    name, given = "model.15.cv2", dict(nano.scores)
    given[name] = torch.zeros_like(given[name])
    given[name][5] = outlier
    plan, again = (nano.choose(0.5, 8, scores=given, scope=scope, floor=0) for _ in range(2))
    assert all(after >= min(8, before) for before, after in plan.widths.values())
    keep = plan.keep[name].tolist()
    assert (
        keep
        == again.keep[name].tolist()
        == sorted({5, *range(len(keep))} if outlier and len(keep) <= 5 else range(len(keep)))
    )


@pytest.mark.fault(32)
def test_out_of_reach_names_what_can_be_reached(nano):
    with pytest.raises(
        RecipeError, match=r"keep_flops=0\.05 cannot be reached; the smallest is .* prune\.floor=0\.5"
    ) as e:
        nano.choose(0.05, floor=0.5)
    smallest = float(re.search(r"smallest is (\S+)", str(e.value)).group(1))
    plan = nano.choose(smallest, floor=0.5)
    assert all(share <= 0.75 for share in shares(plan).values())
    with pytest.raises(RecipeError, match="cannot be reached"):
        nano.choose(smallest - 0.001, floor=0.5)


def test_steps_too_coarse_name_the_nearest_budget(nano):
    one = [group for group in nano.groups if group.name == "model.15.cv2"]

    def plan(keep_flops, round_to):
        shapes = conv_shapes(nano.model, HW)
        limit = budget.keep_flops(shapes, keep_flops)
        return choose(nano.model, one, nano.scores, limit, round_to, shapes, floor=0)

    with pytest.raises(RecipeError, match=r"within 2 % in steps of prune\.round_to=32; the nearest below is") as e:
        plan(0.999, 32)
    nearest = float(re.search(r"below is (\S+);", str(e.value)).group(1))
    assert plan(nearest, 32).widths == {"model.15.cv2": (64, 32)}  # the advice works
    assert plan(0.999, 8).widths == {"model.15.cv2": (64, 56)}


@pytest.mark.fault(32)
@pytest.mark.parametrize("keep_flops", [0, 1, -0.5, 1.5, float("nan"), float("inf")])
def test_keep_flops_is_a_share(nano, keep_flops):
    with pytest.raises(RecipeError, match=f"keep_flops must lie between 0 and 1, both excluded, got {keep_flops}"):
        nano.choose(keep_flops)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 12}, "round_to must be a power of two, got 12"),
        ({"round_to": 0}, "round_to must be a power of two"),
        ({"floor": 1.0}, "floor must be at least 0 and less than 1"),
        ({"floor": float("nan")}, "floor must be at least 0"),
        ({"scope": "both"}, "scope must be one of global, local, isomorphic, got 'both'"),
    ],
)
def test_settings_out_of_range(nano, options, message):
    with pytest.raises(RecipeError, match=message):
        nano.choose(0.5, **options)


def test_bad_scores_name_their_group(nano):
    bad = dict(nano.scores)
    bad["model.7"] = bad["model.7"].clone()
    bad["model.7"][0] = float("nan")
    with pytest.raises(NumericsError, match=r"importance of model\.7 is NaN"):
        nano.choose(0.5, scores=bad)
    with pytest.raises(RecipeError, match=r"\(3,\) scores for model\.7, expected \(256,\)"):
        nano.choose(0.5, scores={**bad, "model.7": torch.ones(3)})


@pytest.mark.parametrize("size", ["n", "s", "11n"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_keep_params_counts_what_torch_counts(cases, size, share):
    case = cases[size]
    shapes = conv_shapes(case.model, HW)
    plan = choose(case.model, case.groups, case.scores, budget.keep_params(shapes, share), 8, shapes)
    pruned = copy.deepcopy(case.model)
    prune(pruned, plan.keep)
    assert (plan.parameters_before, plan.parameters_after) == (parameters(case.model), parameters(pruned))
    assert share * (1 - TOLERANCE) <= plan.parameters_after / plan.parameters_before <= share


def test_macs_of_each_convolution_after_surgery(nano):
    plan = nano.choose(0.5)
    pruned = copy.deepcopy(nano.model)
    prune(pruned, plan.keep)
    after = {name: shape.macs for name, shape in conv_shapes(pruned, HW).items()}
    assert {name: macs for name, (_, macs) in plan.macs.items()} == after


def test_least_widths_hold(nano):
    least = {"model.5": 120, "model.2.cv1a": 16}
    plan = nano.choose(0.3, least=least, floor=0)
    assert plan.widths["model.5"] == (128, 120)
    assert plan.widths["model.2.cv1a"] == plan.widths["model.2.cv1b"] == (16, 16)  # both halves have equal widths


class Table:
    """Layer times of a machine on which a MAC takes 1 ns, each layer 10 us, and the rest 1 ns per unit of width."""

    def __init__(self, model, factor=1.0):
        self.shapes = conv_shapes(model, HW)
        points = {name: [s.macs * part for part in (1.0, 0.5, 0.25, 0.06)] for name, s in self.shapes.items()}
        roots = [math.sqrt(sum(row[i] for row in points.values())) for i in range(4)]
        self.json = {
            "layers": {name: [[macs, 0.01 + macs * 1e-6] for macs in row] for name, row in points.items()},
            "rest": [[root, root * 1e-6] for root in roots],
        }
        self.json["whole_ms"] = factor * self.ms(self.shapes)
        self.factor = factor

    def ms(self, shapes):
        macs = [shape.macs for shape in shapes.values()]
        return sum(0.01 + one * 1e-6 for one in macs) + math.sqrt(sum(macs)) * 1e-6


@pytest.mark.parametrize("factor", [1.0, 0.8])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_latency_of_a_linear_machine_is_exact(nano, share, factor):
    table = Table(nano.model, factor)
    limit = share * table.json["whole_ms"]
    plan = nano_plan(nano, budget.latency_ms(table.shapes, table.json, limit))
    pruned = copy.deepcopy(nano.model)
    prune(pruned, plan.keep)
    assert plan.cost == pytest.approx(factor * table.ms(conv_shapes(pruned, HW)), rel=1e-9)
    assert limit * (1 - TOLERANCE) <= plan.cost <= limit


def nano_plan(nano, limit):
    return choose(nano.model, nano.groups, nano.scores, limit, 8, conv_shapes(nano.model, HW))


def test_a_latency_that_is_already_met_or_out_of_reach_is_refused(nano):
    table = Table(nano.model)
    with pytest.raises(RecipeError, match=r"latency_ms=1e\+06 is already met: the unpruned model takes"):
        budget.latency_ms(table.shapes, table.json, 1e6)
    with pytest.raises(RecipeError, match=r"latency_ms=0\.1 cannot be reached; the smallest is") as e:
        nano_plan(nano, budget.latency_ms(table.shapes, table.json, 0.1))
    smallest = float(re.search(r"smallest is (\S+)", str(e.value)).group(1))
    nano_plan(nano, budget.latency_ms(table.shapes, table.json, smallest))


def test_a_table_of_another_model_is_refused(nano):
    table = Table(nano.model).json
    del table["layers"]["model.0.conv"]
    with pytest.raises(RecipeError, match=r"has no layer model\.0\.conv, so it belongs to another model"):
        budget.latency_ms(conv_shapes(nano.model, HW), table, 1.0)
