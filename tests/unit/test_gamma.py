"""The L1 pull on gammas is the exact subgradient, reaches gammas only, and its histograms survive a resume."""

import json
from math import inf, nan

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.gamma import BIN_WIDTH, BINS, GammaL1


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
    """What one call of before_step adds to each gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hook.before_step(model)
    return gradients(model)


def test_adds_the_subgradient_to_gammas_and_nothing_else(model):
    norms(model)["model.0.bn"].weight.data[0] = 0
    hook = GammaL1(1e-3)
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
    hook = GammaL1(0.25)
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
    hook = GammaL1(0.5, ramp)
    hook.on_model(model)
    hook.on_epoch_start(epoch, 10)
    gamma = norms(model)["model.4.cv1.bn"].weight.detach()
    assert torch.equal(pulled(hook, model)["model.4.cv1.bn.weight"], 0.5 * share * torch.sign(gamma))


def test_gradient_descent_on_it_shrinks_gammas(model):
    hook = GammaL1(0.1)
    hook.on_model(model)
    hook.on_epoch_start(0, 1)
    before = sum(norm.weight.detach().abs().sum() for norm in norms(model).values())
    step = pulled(hook, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.01 * step[name]
    after = sum(norm.weight.detach().abs().sum() for norm in norms(model).values())
    assert after < before


def test_histogram_and_figures(model):
    channels = sum(norm.num_features for norm in norms(model).values())
    for norm in norms(model).values():
        nn.init.ones_(norm.weight)
    first = norms(model)["model.0.bn"].weight.data
    first[:6] = torch.tensor([0.0, 0.009, -0.07, 3.99, 5.0, -100.0])
    hook = GammaL1(1e-4)
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
    hook = GammaL1(1e-3)
    hook.on_model(model)
    hook.on_epoch_end(0, model)
    state = hook.state_dict()
    hook.on_epoch_end(1, model)
    assert state["histograms"]["epochs"] == [-1, 0]  # a snapshot: later epochs do not change it

    resumed = GammaL1(1e-3)
    with torch.no_grad():
        for norm in norms(model).values():
            norm.weight.mul_(0.5)
    resumed.on_model(model)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # also the start is that of the first run
    resumed.on_epoch_end(1, model)
    assert resumed.histograms["epochs"] == [-1, 0, 1]
    assert state["histograms"]["epochs"] == [-1, 0]


def test_nan_names_layer_and_epoch(model):
    hook = GammaL1(1e-3)
    hook.on_model(model)
    norms(model)["model.6.cv2.bn"].weight.data[1] = float("nan")
    with pytest.raises(NumericsError, match=r"gamma of model\.6\.cv2\.bn is NaN or infinite in epoch 2"):
        hook.on_epoch_end(2, model)


def test_a_frozen_gamma_is_named(model):
    hook = GammaL1(1e-3)
    hook.on_model(model)
    norms(model)["model.1.bn"].weight.grad = None
    with pytest.raises(RecipeError, match=r"gamma of model\.1\.bn gets no gradient"):
        hook.before_step(model)


@pytest.mark.parametrize(("strength", "ramp"), [(0, 0), (-1, 0), (nan, 0), (inf, 0), (1e-3, -1), (1e-3, nan)])
def test_settings_out_of_range(strength, ramp):
    with pytest.raises(RecipeError, match=r"lambda must be > 0 and ramp_epochs >= 0"):
        GammaL1(strength, ramp)
