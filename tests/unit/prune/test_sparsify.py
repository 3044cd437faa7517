"""The L1 penalty adds the exact subgradient to gammas only. Histograms survive a resume, and a collapse stops training."""

import json
from math import inf, nan

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.graph import Group, Member, prunable
from yolo_compress.prune.penalty import L1
from yolo_compress.prune.sparsify import BIN_WIDTH, BINS, SparseTraining, collapsed, mass_under_cut, masses, verdict


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    for norm in norms(model).values():
        nn.init.normal_(norm.weight)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def pulled(hook, model):
    """The values that one call of before_step adds to each gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hook.before_step(model)
    return gradients(model)


def test_adds_the_subgradient_to_gammas_and_nothing_else(model):
    norms(model)["model.0.bn"].weight.data[0] = 0
    hook = SparseTraining(L1(), 1e-3)
    hook.on_model(model)
    hook.on_epoch_start(0, 5)
    before = gradients(model)
    hook.before_step(model)
    after = gradients(model)
    gammas = {f"{name}.weight": norm.weight.detach() for name, norm in norms(model).items()}
    assert len(gammas) == 57
    for name in before:
        extra = 1e-3 * torch.sign(gammas[name]) if name in gammas else torch.zeros_like(before[name])
        assert torch.equal(after[name], before[name] + extra), name
    assert after["model.0.bn.weight"][0] == before["model.0.bn.weight"][0]


def test_it_is_the_gradient_of_the_penalty(model):
    hook = SparseTraining(L1(), 0.25)
    hook.on_model(model)
    hook.on_epoch_start(3, 5)
    got = pulled(hook, model)
    penalty = 0.25 * sum(norm.weight.abs().sum() for norm in norms(model).values())
    model.zero_grad()
    penalty.backward()
    for name, norm in norms(model).items():
        assert torch.equal(got[f"{name}.weight"], norm.weight.grad)


@pytest.mark.parametrize(
    ("ramp", "epoch", "share"), [(0, 0, 1), (4, 0, 0.25), (4, 1, 0.5), (4, 3, 1), (4, 9, 1), (1, 0, 1)]
)
def test_ramp(model, ramp, epoch, share):
    hook = SparseTraining(L1(), 0.5, ramp)
    hook.on_model(model)
    hook.on_epoch_start(epoch, 10)
    gamma = norms(model)["model.4.cv1.bn"].weight.detach()
    assert torch.equal(pulled(hook, model)["model.4.cv1.bn.weight"], 0.5 * share * torch.sign(gamma))


def test_gradient_descent_on_it_shrinks_gammas(model):
    hook = SparseTraining(L1(), 0.1)
    hook.on_model(model)
    hook.on_epoch_start(0, 1)
    before = sum(norm.weight.detach().abs().sum() for norm in norms(model).values())
    step = pulled(hook, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.01 * step[name]
    after = sum(norm.weight.detach().abs().sum() for norm in norms(model).values())
    assert after < before


def test_the_rate_of_all_prunable_gammas_is_scaled(model):
    hook = SparseTraining(L1(), 1e-3, gamma_lr_scale=10.0)
    hook.on_model(model)
    prunable_norms = {member.module for group in prunable(model) for member in group.having("norm")}
    assert hook.rates(model) == {f"{name}.weight": 10.0 for name in prunable_norms}


def test_histogram_and_figures(model):
    channels = sum(norm.num_features for norm in norms(model).values())
    for norm in norms(model).values():
        nn.init.ones_(norm.weight)
    first = norms(model)["model.0.bn"].weight.data
    first[:6] = torch.tensor([0.0, 0.009, -0.07, 3.99, 5.0, -100.0])
    hook = SparseTraining(L1(), 1e-4)
    hook.on_model(model)
    figures = hook.on_epoch_end(0, model)
    assert figures["gamma_share_small"] == pytest.approx(2 / channels)
    mean = (0.009 + 0.07 + 3.99 + 5 + 100 + channels - 6) / channels
    assert figures["gamma_mean"] == pytest.approx(mean, rel=1e-5)
    got = hook.histograms
    assert (got["bin_width"], got["epochs"]) == (BIN_WIDTH, [-1, 0])
    for counts in got["counts"]:
        assert len(counts) == BINS and sum(counts) == channels
        assert (counts[0], counts[1], counts[79], counts[80]) == (2, 1, 1, 2)
    json.dumps(got)


def test_state_round_trip(model):
    hook = SparseTraining(L1(), 1e-3)
    hook.on_model(model)
    hook.on_epoch_end(0, model)
    state = hook.state_dict()
    hook.on_epoch_end(1, model)
    assert state["histograms"]["epochs"] == [-1, 0]  # a snapshot: later epochs do not change it

    resumed = SparseTraining(L1(), 1e-3)
    with torch.no_grad():
        for norm in norms(model).values():
            norm.weight.mul_(0.5)
    resumed.on_model(model)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # epoch -1 is that of the first run, too
    resumed.on_epoch_end(1, model)
    assert resumed.histograms["epochs"] == [-1, 0, 1]
    assert state["histograms"]["epochs"] == [-1, 0]


def test_nan_names_layer_and_epoch(model):
    hook = SparseTraining(L1(), 1e-3)
    hook.on_model(model)
    norms(model)["model.6.cv2.bn"].weight.data[1] = float("nan")
    with pytest.raises(
        NumericsError,
        match=r"gamma of model\.6\.cv2\.bn is NaN or infinite in epoch 3; the state after epoch 2",
    ):
        hook.on_epoch_end(2, model)


def test_a_frozen_gamma_is_named(model):
    hook = SparseTraining(L1(), 1e-3)
    hook.on_model(model)
    norms(model)["model.1.bn"].weight.grad = None
    with pytest.raises(RecipeError, match=r"weight of model\.1\.bn gets no gradient"):
        hook.before_step(model)


@pytest.mark.parametrize(("strength", "ramp"), [(0, 0), (-1, 0), (nan, 0), (inf, 0), (1e-3, -1), (1e-3, nan)])
def test_settings_out_of_range(strength, ramp):
    with pytest.raises(RecipeError, match=r"lambda must be > 0 and ramp_epochs >= 0"):
        SparseTraining(L1(), strength, ramp)


def collapse(model, group):
    with torch.no_grad():
        for member in group.having("norm"):
            model.get_submodule(member.module).weight[member.offset : member.offset + group.width] = 0.009


def test_a_collapsed_layer_stops_with_layer_epoch_and_cure(model):
    hook = SparseTraining(L1(), 0.02)
    hook.on_model(model)
    before = hook.state_dict()
    collapse(model, next(group for group in prunable(model) if group.name == "model.3"))
    with pytest.raises(NumericsError) as caught:
        hook.on_epoch_end(4, model)
    assert caught.value.exit_code == 7
    assert str(caught.value) == (
        "sparsify: every gamma of model.3.bn (group model.3) is under 0.01 in epoch 5, so these layers have no effect; "
        "the state after epoch 4 is kept. Lower sparsify.l1 (now 0.02)"
    )
    assert hook.state_dict() == before  # the bad epoch leaves no trace


def test_half_a_c2f_can_collapse_alone(model):
    hook = SparseTraining(L1(), 1e-3)
    hook.on_model(model)
    collapse(model, next(group for group in prunable(model) if group.name == "model.8.cv1a"))
    with pytest.raises(NumericsError, match=r"model\.8\.cv1\.bn \(group model\.8\.cv1a\).*no epoch was completed"):
        hook.on_epoch_end(0, model)


def test_a_faded_branch_or_one_live_channel_is_no_collapse(model):
    hook = SparseTraining(L1(), 1e-3)
    hook.on_model(model)
    norms(model)["model.4.m.0.cv2.bn"].weight.data.fill_(0)  # in the group of its trunk, model.4.cv1
    norms(model)["model.3.bn"].weight.data.fill_(0)
    norms(model)["model.3.bn"].weight.data[5] = -0.5
    hook.on_epoch_end(0, model)


class TwoNorms(nn.Module):
    """Four channels with gammas a, and two with gammas b in two BatchNorms, the second at an offset."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm2d(4), nn.BatchNorm2d(2), nn.BatchNorm2d(3)
        self.a.weight.data = torch.tensor([4.0, -1.0, 0.5, 2.5])
        self.b.weight.data = torch.tensor([1.0, 3.0])
        self.c.weight.data = torch.tensor([99.0, 2.0, -5.0])
        self.groups = [
            Group("a", 4, "a", (Member("a", "norm", 0),)),
            Group("b", 2, "b", (Member("b", "norm", 0), Member("c", "norm", 1))),
        ]


@pytest.mark.parametrize(
    ("percent", "under"),
    [(25, 0.5), (50, 0.5 + 1 + 1 + 2), (75, 0.5 + 1 + 2.5 + 1 + 2 + 3 + 5), (100, 19.0)],  # 75 % of 2 channels are 2
)
def test_mass_under_the_cut_by_hand(percent, under):
    net = TwoNorms()
    assert mass_under_cut(net, net.groups, percent) == pytest.approx(under / 19)


def test_mass_of_even_gammas_is_the_share_of_channels(model):
    for norm in norms(model).values():
        nn.init.constant_(norm.weight, -0.7)
    assert masses(model) == pytest.approx({"25": 0.25, "50": 0.5, "75": 0.75})


def test_mass_ignores_what_lies_above_the_cut_and_a_dead_net_has_none():
    net = TwoNorms()
    net.a.weight.data = torch.tensor([0.0, 8.0, 0.0, 1.0])
    net.b.weight.data.zero_()
    net.c.weight.data.zero_()
    assert mass_under_cut(net, net.groups, 50) == 0
    net.a.weight.data.zero_()
    assert mass_under_cut(net, net.groups, 50) == 0


def test_verdict_says_before_after_and_whether_lambda_did_anything():
    before = {"25": 0.15, "50": 0.34, "75": 0.6}
    said = verdict(before, {"25": 0.05, "50": 0.2, "75": 0.5})
    assert said == (
        "gamma mass in the weakest 25, 50, 75 % of channels: before 15.0%, 34.0%, 60.0%; after 5.0%, 20.0%, 50.0%"
    )
    assert verdict(before, before).endswith("lambda had little effect: raise sparsify.l1, gamma_lr_scale or epochs")


def test_a_net_that_finds_nothing_any_more_has_collapsed():
    assert collapsed(0.6, 0.059)
    assert not collapsed(0.6, 0.061)
    assert not collapsed(0.01, 0.0)  # it detected nothing before


def test_the_scaler_multiplies_no_penalty(model):
    """A step under mixed precision is unscale, penalty, step. The loss is scaled by 1024, the penalty is not."""
    hook = SparseTraining(L1(), 0.25)
    hook.on_model(model)
    hook.on_epoch_start(0, 1)
    gamma = norms(model)["model.3.bn"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.zero_grad()
    loss = 3 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)
    scaler.scale(loss).backward()
    start = gamma.detach().clone()
    scaler.unscale_(optimizer)
    hook.before_step(model)
    scaler.step(optimizer)
    assert torch.equal(gamma.detach(), start - 0.5 * (3 + 0.25 * torch.sign(start)))
