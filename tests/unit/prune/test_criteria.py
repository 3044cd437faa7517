"""Importance scores equal values calculated by hand, for a group of two writers and two BatchNorms."""

import pytest
import torch
from torch import nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.criteria import bn_gamma, find, fpgm, l1, l2, lamp, random, scores
from yolo_compress.prune.graph import Group, Member

GROUP = Group(
    "a",
    2,
    "a",
    (
        Member("a", "out", 0),
        Member("a_bn", "norm", 0),
        Member("b", "out", 1),  # the last two of three filters
        Member("b_bn", "norm", 1),
        Member("reader", "in", 0),
    ),
)


@pytest.fixture
def model():
    model = nn.ModuleDict(
        {
            "a": nn.Conv2d(1, 2, (1, 2), bias=False),
            "a_bn": nn.BatchNorm2d(2),
            "b": nn.Conv2d(2, 3, 1, bias=False),
            "b_bn": nn.BatchNorm2d(3),
            "reader": nn.Conv2d(2, 1, 1, bias=False),
        }
    )
    with torch.no_grad():
        model["a"].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, -1.0]]).reshape(2, 1, 1, 2))
        model["b"].weight.copy_(torch.tensor([[100.0, 100.0], [1.0, 0.0], [0.0, 3.0]]).reshape(3, 2, 1, 1))
        model["a_bn"].weight.copy_(torch.tensor([-3.0, 1.0]))
        model["b_bn"].weight.copy_(torch.tensor([100.0, 0.5, -1.5]))
        model["reader"].weight.fill_(float("nan"))  # no criterion uses readers
    return model


# the scores of a member are divided by their mean, then averaged over members
EXPECTED = {
    "bn_gamma": [(3 / 2 + 0.5 / 1) / 2, (1 / 2 + 1.5 / 1) / 2],
    "l1": [(7 / 4 + 1 / 2) / 2, (1 / 4 + 3 / 2) / 2],
    "l2": [(5 / 3 + 1 / 2) / 2, (1 / 3 + 3 / 2) / 2],
    "fpgm": [1.0, 1.0],  # two filters are equally far from each other
    "lamp": [(1 / (27 / 52) + 0.1 / 0.55) / 2, (1 / 26 / (27 / 52) + 1 / 0.55) / 2],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_by_hand(model, name):
    got = find(name)(Evidence(model, [GROUP]), GROUP)
    assert got.dtype is torch.float32 and not got.requires_grad
    assert got.tolist() == pytest.approx(EXPECTED[name], rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_scores_do_not_depend_on_the_scale_of_a_layer(model, name):
    with torch.no_grad():
        for layer in ("a", "a_bn"):
            model[layer].weight.mul_(-1000)
    assert find(name)(Evidence(model, [GROUP]), GROUP).tolist() == pytest.approx(EXPECTED[name], rel=1e-6)


def test_half_precision_gives_the_same_scores(model):
    for name, expected in EXPECTED.items():
        assert find(name)(Evidence(model.half(), [GROUP]), GROUP).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_dead_member_leaves_the_choice_to_the_others(model):
    nn.init.zeros_(model["b_bn"].weight)
    assert bn_gamma(Evidence(model, [GROUP]), GROUP).tolist() == [0.75, 0.25]
    nn.init.zeros_(model["a_bn"].weight)
    assert bn_gamma(Evidence(model, [GROUP]), GROUP).tolist() == [0, 0]


@pytest.mark.fault(33)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_their_layer(model, value):
    with torch.no_grad():
        model["b_bn"].weight[2] = value
        model["b"].weight[1, 0, 0, 0] = value
    with pytest.raises(NumericsError, match="gamma of b_bn is NaN or infinite in 1 of 2 channels"):
        bn_gamma(Evidence(model, [GROUP]), GROUP)
    for criterion in (l1, l2, fpgm, lamp):
        with pytest.raises(NumericsError, match="weight of b is NaN or infinite in 1 of 2"):
            criterion(Evidence(model, [GROUP]), GROUP)


def test_random_is_a_function_of_seed_and_group(model):
    other = Group("c", 2, "c", GROUP.members)
    torch.manual_seed(1)
    first = random(Evidence(model, [], seed=7), GROUP)
    torch.manual_seed(2)
    assert torch.equal(random(Evidence(model, [], seed=7), GROUP), first)
    assert not torch.equal(random(Evidence(model, [], seed=8), GROUP), first)
    assert not torch.equal(random(Evidence(model, [], seed=7), other), first)
    assert first.mean().item() == pytest.approx(1) and bool((first >= 0).all())


def test_scores_are_by_group(model):
    got = scores(Evidence(model, [GROUP, Group("c", 2, "c", GROUP.members[:2])]), l1)
    assert list(got) == ["a", "c"]
    assert got["c"].tolist() == [7 / 4, 1 / 4]


def test_a_criterion_of_ones_own(model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\n\ndef last(evidence, group):\n    return torch.arange(float(group.width))\n")
    assert find(f"{file}:last")(Evidence(model, [GROUP]), GROUP).tolist() == [0, 1]
    assert find("l1") is l1
    for name, said in ((f"{file}:first", "no function 'first'"), (f"{file}x.py:last", "no file"), ("l3", "no file")):
        with pytest.raises(RecipeError, match=said):
            find(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def mine(group): ...", r"mine takes \(group\), expected a function of \(evidence, group\)"),
        ("def mine(evidence, group, *, power): ...", r"takes \(evidence, group, \*, power\), expected"),
        ("mine = 3", "mine is a int, expected a function"),
        ("import torch\n\nmine = torch.nothing", r"cannot be imported: AttributeError: .*'nothing' \(line 3\)"),
        ("def mine(evidence, group)\n    pass", r"cannot be imported: SyntaxError: .* \(line 1\)"),
    ],
)
def test_an_invalid_criterion_is_refused_with_the_expected_form(tmp_path, text, said):
    (tmp_path / "own.py").write_text(text + "\n")
    with pytest.raises(RecipeError, match=rf"^prune\.criterion: .*own\.py.*{said}"):
        find(f"{tmp_path}/own.py:mine")
