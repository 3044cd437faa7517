"""Moments, gradients, `obs` scores and reconstruction equal direct calculations and least squares on the same data."""

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import DataError, NumericsError
from yolo_compress.nets.detect import by_branch
from yolo_compress.prune.calibration_stats import Evidence, input_moments
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import Group, Member, prunable
from yolo_compress.prune.obs import obs
from yolo_compress.prune.reconstruct import RIDGE, reconstruct
from yolo_compress.recipe.choices import CRITERIA

WIDTH = 6
GROUP = Group("writer", WIDTH, "writer", (Member("0", "out", 0), Member("1", "norm", 0), Member("2", "in", 0)))


@pytest.fixture
def net():
    """Six channels that are linear in three inputs, so three of them determine the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 4, 1)).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].bias, -1.0, 1.0)
    return model


@pytest.fixture
def images():
    return torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def read_by_last(net, images):
    """Inputs of the last convolution as channels x samples, float64."""
    with torch.no_grad():
        return net[1](net[0](images)).double().transpose(0, 1).flatten(1)


def test_moments_are_those_of_the_samples(net, images):
    got = input_moments(net, [GROUP], images.split(3))["2"]
    x_CN = read_by_last(net, images)
    assert torch.allclose(got.mean_C, x_CN.mean(1), atol=1e-6)
    assert torch.allclose(got.cov_CC, torch.cov(x_CN, correction=0), atol=1e-5)


def test_no_images_and_broken_ones(net):
    with pytest.raises(DataError, match="no calibration images"):
        _ = Evidence(net, [GROUP]).moments
    with pytest.raises(DataError, match="no calibration images"):
        _ = Evidence(net, [GROUP]).gradients
    with pytest.raises(NumericsError, match="inputs of 2 are NaN"):
        _ = Evidence(net, [GROUP], images=lambda: [torch.full((1, 3, 4, 4), torch.nan)]).moments


def test_the_model_is_left_alone(net, images):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    evidence = Evidence(net, [GROUP], lambda: [images], lambda model: [model(images).square().mean()])
    _ = evidence.moments, evidence.gradients
    assert net.training and not net[2]._forward_pre_hooks
    assert all(parameter.grad is None for parameter in net.parameters())
    net.eval()
    evidence = Evidence(net, [GROUP], lambda: [images])
    obs(evidence, GROUP)
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in ("0.weight", "2.weight"))


def least_squares_error(net, images, gone):
    """Share of the output variance of the last convolution that no affine function of the other channels explains."""
    x_CN = read_by_last(net, images)
    x_CN = x_CN - x_CN.mean(1, keepdim=True)
    y_ON = net[2].weight.detach().double().flatten(1) @ x_CN
    kept = [c for c in range(WIDTH) if c not in gone]
    solution = torch.linalg.lstsq(x_CN[kept].T, y_ON.T, driver="gelsd").solution
    return float((y_ON - solution.T @ x_CN[kept]).square().sum() / y_ON.square().sum())


def test_obs_scores_are_the_errors_of_least_squares(net, images):
    noisy = nn.Sequential(net[0], net[1], nn.SiLU(), net[2])  # a nonlinearity: no channel is redundant
    group = Group("writer", WIDTH, "writer", (*GROUP.members[:2], Member("3", "in", 0)))
    score_C = obs(Evidence(noisy, [group], lambda: [images]), group)

    class Front(nn.Sequential):
        def forward(self, x):
            return nn.functional.silu(super().forward(x))

    same = nn.ModuleList([nn.Identity(), Front(net[0], net[1]), net[2]])
    gone = []
    for channel in score_C.argsort().tolist()[:-1]:
        gone.append(channel)
        assert float(score_C[channel]) == pytest.approx(
            least_squares_error(same, images, gone), rel=0.05, abs=2 * RIDGE
        )


def test_redundant_channels_cost_nothing_until_three_are_left(net, images):
    score_C = obs(Evidence(net, [GROUP], lambda: [images]), GROUP).sort().values
    assert score_C[2] < 1e-3 and score_C[3] > 1e-2  # three channels determine all


def test_reconstruction_of_redundant_channels_changes_nothing(net, images):
    evidence = Evidence(net, [GROUP], lambda: [images])
    keep = {"writer": obs(evidence, GROUP).argsort()[3:].sort().values}
    with torch.no_grad():
        expected = net(images)
        zeroed = nn.Conv2d(WIDTH, 4, 1)
        zeroed.load_state_dict(net[2].state_dict())
        zeroed.weight[:, [c for c in range(WIDTH) if c not in keep["writer"].tolist()]] = 0
        plain = nn.Sequential(net[0], net[1], zeroed)(images)
        reconstruct(net, [GROUP], keep, evidence.moments)
        got = net(images)
    scale = expected.std()
    assert (plain - expected).abs().max() > 0.5 * scale
    assert (got - expected).abs().max() < 0.02 * scale  # the ridge
    assert bool((net[2].weight[:, [c for c in range(WIDTH) if c not in keep["writer"].tolist()]] == 0).all())


def test_keeping_all_changes_no_bit(net, images):
    before = net[2].weight.clone()
    moments = input_moments(net, [GROUP], [images])
    reconstruct(net, [GROUP], {"writer": torch.arange(WIDTH)}, moments)
    reconstruct(net, [GROUP], {}, moments)
    assert torch.equal(net[2].weight, before)


def test_gradients_by_hand(net, images):
    """With a loss that reads one channel, only this channel has a score: the first-order change if it is scaled to 0."""

    def losses(model):
        for part in images.split(4):
            yield model[1](model[0](part))[:, 2].mean().square()

    evidence = Evidence(net, [GROUP], losses=losses)
    expected = []
    for part in images.split(4):
        mean = float(net[1](net[0](part))[:, 2].mean().detach())
        expected.append((2 * mean * mean) ** 2)  # the gate's derivative at 1 of (gate x mean)^2 is 2 mean^2
    gate_C = evidence.gradients.gate["1"]
    assert gate_C[2] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert [c for c in range(WIDTH) if gate_C[c] > 0] == [2]
    assert evidence.gradients.fisher["0"].nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_every_group_of_a_detector(name, yaml):
    torch.manual_seed(0)
    model = DetectionModel(yaml, nc=3, verbose=False).eval()
    groups = prunable(model)
    images = torch.rand(2, 3, 64, 64)

    def losses(model):
        outputs = by_branch(model(images)[1]).values()
        yield sum(one["boxes"].square().mean() + one["scores"].square().mean() for one in outputs)

    got = scores(Evidence(model, groups, lambda: [images], losses), find(name))
    assert list(got) == [group.name for group in groups]
    for group in groups:
        score_C = got[group.name]
        assert score_C.shape == (group.width,) and score_C.dtype is torch.float32
        assert bool((score_C >= 0).all() & torch.isfinite(score_C).all()) and float(score_C.sum()) > 0
