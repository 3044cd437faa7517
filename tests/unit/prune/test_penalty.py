"""Penalties of sparse training equal the gradients of autograd, and the factor of lambda is the cost of a channel."""

import copy

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import RecipeError
from yolo_compress.nets.families import check_prunable
from yolo_compress.prune.cost import channel_macs, conv_macs
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.penalty import L1, GroupLasso, Polarization, macs_scale
from yolo_compress.prune.sparsify import SparseTraining


@pytest.fixture(scope="module", params=["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def model(request):
    torch.manual_seed(0)
    model = DetectionModel(request.param, nc=3, verbose=False).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return model


@pytest.fixture(scope="module")
def groups(model):
    return prunable(model)


def added(penalty, model, strength=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_subgradient(model, strength)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def differentiated(penalty, model):
    """Gradients that autograd computes for a penalty given as a scalar."""
    model.zero_grad()
    penalty.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def group_norms(model, group):
    """`n_k` of each channel, computed member by member from the definition."""
    squares = []
    for member in group.members:
        weight = model.get_submodule(member.module).weight
        channels = weight.transpose(0, 1) if member.role == "in" else weight
        squares.append(channels[member.offset : member.offset + group.width].flatten(1 if weight.ndim > 1 else 0))
    return sum(square.square().sum(1) if square.ndim > 1 else square.square() for square in squares).sqrt()


def test_group_lasso_is_the_gradient_of_the_norms_of_all_weights_of_a_channel(model, groups):
    scale = {group.name: 0.5 + place / 10 for place, group in enumerate(groups[::2])}
    penalty = GroupLasso()
    penalty.bind(model, groups, scale)
    got = added(penalty, model, 0.25)
    value = sum(0.25 * scale.get(group.name, 1) * group_norms(model, group).sum() for group in groups)
    expected = differentiated(value, model)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert not got["model.2.cv1.bn.bias"].any()
    output = check_prunable(model).outputs[0]
    assert not got[f"{output}.bias"].any()
    assert got[f"{output}.weight"].any()  # reads prunable channels, although its own outputs are not prunable


def test_polarization_is_the_gradient_of_the_gammas_below_the_mean_of_their_group(model, groups):
    scale = {group.name: 0.5 + place / 10 for place, group in enumerate(groups[::2])}
    penalty = Polarization()
    penalty.bind(model, groups, scale)
    got = added(penalty, model, 0.25)
    value = 0.0
    for group in groups:
        mass = sum(
            model.get_submodule(member.module).weight[member.offset : member.offset + group.width].abs()
            for member in group.having("norm")
        )
        weak = (mass < mass.mean()).detach()
        assert 0 < int(weak.sum()) < group.width
        value = value + 0.25 * scale.get(group.name, 1) * mass[weak].sum()
    expected = differentiated(value, model)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_polarization_leaves_the_strongest_and_even_gammas_alone(model, groups):
    """Gradient descent on the penalty alone weakens the weak channels and stops when the mean is below all others."""
    own = copy.deepcopy(model)
    penalty = Polarization()
    penalty.bind(own, groups, {})
    norms = [module for module in own.modules() if isinstance(module, nn.BatchNorm2d)]
    strong = {name: max(masses(own, group)) for name, group in ((group.name, group) for group in groups)}
    for _ in range(60):
        gradients = added(penalty, own)
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter -= 0.05 * gradients[name]
    for group in groups:
        assert max(masses(own, group)) == strong[group.name]
    for norm in norms:
        nn.init.ones_(norm.weight)
    assert not any(gradient.any() for gradient in added(penalty, own).values())


def masses(model, group):
    parts = [model.get_submodule(m.module).weight[m.offset : m.offset + group.width] for m in group.having("norm")]
    return sum(part.detach().abs() for part in parts).tolist()


def test_it_adds_to_the_gradient_that_is_there(model, groups):
    penalty = GroupLasso()
    penalty.bind(model, groups, {})
    pull = added(penalty, model)
    torch.manual_seed(1)
    before = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone()
    penalty.add_subgradient(model, 2.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] + 2 * pull[name], rtol=1e-12, atol=1e-12)


def test_the_pull_on_a_channel_has_length_one(model, groups):
    """The norm of `theta / n` is 1 for any size of the weights, so weak and strong channels have equal subgradients."""
    group = next(group for group in groups if group.name == "model.3")
    penalty = GroupLasso()
    penalty.bind(model, [group], {})  # one group only, since a filter in two groups gets two subgradients
    got = added(penalty, model)
    squares = sum(
        (gradient.transpose(0, 1) if name == "model.4.cv1.conv.weight" else gradient)
        .reshape(group.width, -1)
        .square()
        .sum(1)
        for name, gradient in got.items()
        if name in ("model.3.conv.weight", "model.3.bn.weight", "model.4.cv1.conv.weight")
    )
    torch.testing.assert_close(squares, torch.ones_like(squares))


def test_a_channel_of_zeros_gets_zero_and_no_nan(groups):
    net = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    group = next(group for group in groups if group.name == "model.3")
    with torch.no_grad():
        net.model[3].conv.weight[7] = 0
        net.model[3].bn.weight[7] = 0
        net.model[4].cv1.conv.weight[:, 7] = 0
    penalty = GroupLasso()
    penalty.bind(net, [group], {})
    got = added(penalty, net)
    assert not got["model.3.conv.weight"][7].any() and not got["model.4.cv1.conv.weight"][:, 7].any()
    assert all(torch.isfinite(gradient).all() for gradient in got.values())


def test_l1_follows_the_scale_of_each_half_of_a_c2f(model, groups):
    penalty = L1()
    penalty.bind(model, groups, {"model.2.cv1a": 3.0, "model.2.cv1b": 0.25})
    got = added(penalty, model, 0.5)
    gamma = model.get_submodule("model.2.cv1.bn").weight.detach()
    factor = torch.tensor([3.0] * 16 + [0.25] * 16, dtype=gamma.dtype)
    assert torch.equal(got["model.2.cv1.bn.weight"], 0.5 * factor * gamma.sign())
    other = model.get_submodule("model.3.bn").weight.detach()
    assert torch.equal(got["model.3.bn.weight"], 0.5 * other.sign())


def test_the_hook_passes_scale_and_ramp_to_the_penalty(model):
    hook = SparseTraining(GroupLasso(), 0.5, ramp_epochs=4, scale={"model.3": 2.0})
    hook.on_model(model)
    hook.on_epoch_start(0, 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hook.before_step(model)
    gamma = model.model[3].bn.weight.detach()
    group = next(group for group in prunable(model) if group.name == "model.3")
    expected = 0.5 / 4 * 2.0 * gamma / group_norms(model, group).detach()
    torch.testing.assert_close(model.model[3].bn.weight.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("yaml", "name"),
    [
        ("yolov8n.yaml", "model.4.m.0.cv1"),  # written and read once
        ("yolov8n.yaml", "model.9.cv1"),  # read four times
        ("yolo11n.yaml", "model.16.cv2"),  # read by a depthwise convolution, too
        ("yolo26n.yaml", "model.16.cv2"),  # read by branches that only training uses, which cost nothing
    ],
)
def test_macs_of_a_channel_are_what_its_removal_saves(yaml, name):
    net = DetectionModel(yaml, nc=3, verbose=False)
    groups = prunable(net)
    group = next(group for group in groups if group.name == name)
    before = conv_macs(net, (128, 96))
    price = channel_macs(net, groups, (128, 96))[name]
    prune(net, {name: torch.arange(1, group.width)})
    assert before - conv_macs(net, (128, 96)) == price, name


def test_scale_is_proportional_to_macs_with_mean_one_over_channels(model, groups):
    scale = macs_scale(model, groups, (64, 64))
    macs = channel_macs(model, groups, (64, 64))
    assert set(scale) == {group.name for group in groups}
    channels = sum(group.width for group in groups)
    assert sum(group.width * scale[group.name] for group in groups) / channels == pytest.approx(1, abs=1e-12)
    assert scale["model.0"] / scale["model.8.cv2"] == pytest.approx(macs["model.0"] / macs["model.8.cv2"])
    assert scale["model.0"] > 1 > scale["model.8.cv2"]


def test_a_frozen_filter_is_named(model, groups):
    penalty = GroupLasso()
    penalty.bind(model, groups, {})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.model[1].conv.weight.grad = None
    with pytest.raises(RecipeError, match=r"weight of model\.1\.conv gets no gradient"):
        penalty.add_subgradient(model, 1.0)
