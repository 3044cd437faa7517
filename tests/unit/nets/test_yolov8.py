"""The split view of C2f has equal outputs in both directions, and keeps the attributes that Ultralytics stores."""

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import C2f
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets.conv import keep_channels
from yolo_compress.nets.families import check_prunable
from yolo_compress.nets.yolov8 import SplitC2f, merge_c2f, split_c2f


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def lively(yaml="yolov8n.yaml", **kwargs):
    """Return a float64 model with random BatchNorm statistics and parameters."""
    torch.manual_seed(0)
    model = DetectionModel(yaml, verbose=False, **kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def layers(model):
    return [(type(layer), layer.i, layer.f, layer.type, layer.np, layer.training) for layer in model.model]


def test_split_and_merge_keep_outputs_state_and_attributes(images):
    model = lively()
    model.model[2].cv1.bn.requires_grad_(False)
    model.model[4].train()
    before, attributes = {k: v.clone() for k, v in model.state_dict().items()}, layers(model)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    expected = model(images)[0]

    split_c2f(model)
    assert sum(isinstance(module, SplitC2f) for module in model.modules()) == 8
    assert not any(isinstance(module, C2f) for module in model.modules())
    assert (model(images)[0] - expected).abs().max() < 1e-12

    model.model[4].train()
    merge_c2f(model)
    assert layers(model) == attributes
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not model.model[2].cv1.bn.weight.requires_grad
    assert model.model[2].cv1.conv.weight.requires_grad
    assert torch.equal(model.eval()(images)[0], expected)


def test_split_keeps_batchnorm_settings():
    model = lively()
    model.model[2].cv1.bn.eps, model.model[2].cv1.bn.momentum = 0.25, 0.125
    split_c2f(model)
    for half in (model.model[2].cv1a, model.model[2].cv1b):
        assert (half.bn.eps, half.bn.momentum, half.bn.num_features, half.conv.out_channels) == (0.25, 0.125, 16, 16)
    merge_c2f(model)
    bn = model.model[2].cv1.bn
    assert (bn.eps, bn.momentum, bn.num_features, model.model[2].c) == (0.25, 0.125, 32, 16)


@pytest.mark.slow
def test_split_trains_like_stock(images):
    model = lively().train()
    sum(part.sum() for part in (model(images)["boxes"], model(images)["scores"])).backward()
    expected = model.model[2].cv1.conv.weight.grad
    model = split_c2f(lively().train())
    sum(part.sum() for part in (model(images)["boxes"], model(images)["scores"])).backward()
    got = torch.cat([model.model[2].cv1a.conv.weight.grad, model.model[2].cv1b.conv.weight.grad])
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_unequal_halves_do_not_merge():
    model = split_c2f(lively())
    half = model.model[2].cv1b
    keep_channels(half.conv, torch.arange(8))
    keep_channels(half.bn, torch.arange(8))
    with pytest.raises(RecipeError, match="16 and 8"):
        merge_c2f(model)


def test_keep_channels_selects_and_keeps_flags():
    conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
    weight, bias = conv.weight.clone(), conv.bias.clone()
    keep_channels(conv, torch.tensor([0, 5]), torch.tensor([1, 3]))
    assert torch.equal(conv.weight, weight[[0, 5]][:, [1, 3]])
    assert torch.equal(conv.bias, bias[[0, 5]])
    assert (conv.out_channels, conv.in_channels, conv.weight.requires_grad) == (2, 2, False)
    with pytest.raises(TypeError, match="Linear"):
        keep_channels(nn.Linear(2, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    ("yaml", "block"),
    [
        ("yolo11n.yaml", r"model\.2 is a C3k2"),
        ("yolo12n.yaml", r"model\.2 is a C3k2"),
        ("yolov10n.yaml", r"model\.5 is a SCDown"),
        ("yolov8n-cls.yaml", r"model\.9 is a Classify head"),
        ("yolov5n.yaml", r"model\.2 is a C3"),
    ],
)
def test_other_architectures_are_named(yaml, block):
    with pytest.raises(RecipeError, match=block):
        check_prunable(DetectionModel(yaml, verbose=False) if "cls" not in yaml else classifier(yaml))


def classifier(yaml):
    from ultralytics.nn.tasks import ClassificationModel

    return ClassificationModel(yaml, verbose=False)


def test_segmentation_head_is_named():
    from ultralytics.nn.tasks import SegmentationModel

    with pytest.raises(RecipeError, match=r"model\.22 is a Segment head"):
        check_prunable(SegmentationModel("yolov8n-seg.yaml", verbose=False))


def test_fused_model_is_named():
    model = DetectionModel("yolov8n.yaml", verbose=False).eval().fuse(verbose=False)
    with pytest.raises(RecipeError, match=r"model\.0 has no BatchNorm"):
        check_prunable(model)


def test_wrapped_and_foreign_modules_are_named():
    model = DetectionModel("yolov8n.yaml", verbose=False)
    nn.utils.parametrizations.weight_norm(model.model[1].conv)
    with pytest.raises(RecipeError, match=r"model\.1\.conv is a ParametrizedConv2d"):
        check_prunable(model)
    with pytest.raises(RecipeError, match="Linear is not an Ultralytics model"):
        check_prunable(nn.Linear(1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_named(value):
    model = DetectionModel("yolov8n.yaml", verbose=False)
    model.model[4].m[0].cv1.bn.running_var[3] = value
    with pytest.raises(NumericsError, match=r"model\.4\.m\.0\.cv1\.bn\.running_var"):
        check_prunable(model)
