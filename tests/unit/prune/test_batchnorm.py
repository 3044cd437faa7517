"""BatchNorm re-estimation sets the statistics of the images and changes nothing else."""

import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from yolo_compress.errors import DataError, NumericsError
from yolo_compress.prune.batchnorm import reestimate_batchnorm


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).double().eval()
    for norm in norms(model):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 4)
    return model


@pytest.fixture
def images():
    return torch.rand(8, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def moments(output_BCHW):
    """Mean and unbiased variance of each channel."""
    values_CN = output_BCHW.transpose(0, 1).flatten(1)
    return values_CN.mean(1), values_CN.var(1)


def close(got, expected):
    return torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_one_batch_gives_its_mean_and_variance_through_the_layers(model, images):
    first, second = model.model[0], model.model[1]
    assert reestimate_batchnorm(model, [images]) == 8
    mean_C, var_C = moments(first.conv(images))
    assert close(first.bn.running_mean, mean_C) and close(first.bn.running_var, var_C)

    biased_C = (
        first.conv(images).transpose(0, 1).flatten(1).var(1, correction=0)
    )  # during re-estimation layers normalise by the batch
    scale_C = first.bn.weight / (biased_C + first.bn.eps).sqrt()
    normalised = (first.conv(images) - mean_C[:, None, None]) * scale_C[:, None, None] + first.bn.bias[:, None, None]
    mean_C, var_C = moments(second.conv(first.act(normalised)))
    assert close(second.bn.running_mean, mean_C) and close(second.bn.running_var, var_C)


@torch.no_grad()
def test_batches_count_equally(model, images):
    first = model.model[0]
    assert reestimate_batchnorm(model, iter(images.split(2))) == 8
    assert close(first.bn.running_mean, moments(first.conv(images))[0])
    of_batches = torch.stack([moments(first.conv(batch))[1] for batch in images.split(2)]).mean(0)
    assert close(first.bn.running_var, of_batches)


@torch.no_grad()
def test_momentum_weighs_the_latest(model, images):
    first = model.model[0]
    reestimate_batchnorm(model, images.split(4), momentum=1.0)
    mean_C, var_C = moments(first.conv(images[4:]))
    assert close(first.bn.running_mean, mean_C) and close(first.bn.running_var, var_C)


def test_only_statistics_change(model, images):
    model.train()
    model.model[3].eval()
    model.model[5].bn.momentum = 0.25
    modes = [module.training for module in model.modules()]
    momenta = [norm.momentum for norm in norms(model)]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reestimate_batchnorm(model, [images])
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in norms(model)] == momenta
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, tensors[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_old_statistics_do_not_matter(model, images):
    reestimate_batchnorm(model, [images])
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for norm in norms(model):
        nn.init.constant_(norm.running_var, 1e6)
    reestimate_batchnorm(model, [images])
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())


def test_images_are_cast_to_the_model(model, images):
    assert reestimate_batchnorm(model, [images.float()]) == 8
    assert model.model[0].bn.running_mean.dtype is torch.float64


def test_no_images_leave_the_statistics(model):
    before = [norm.running_mean.clone() for norm in norms(model)]
    with pytest.raises(DataError, match="has no images"):
        reestimate_batchnorm(model, [])
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms(model), before, strict=True))


def test_flags_come_back_when_the_images_fail(model, images):
    def broken():
        yield images
        raise OSError("disk")

    modes = [module.training for module in model.modules()]
    with pytest.raises(OSError, match="disk"):
        reestimate_batchnorm(model, broken())
    assert [module.training for module in model.modules()] == modes
    assert {norm.momentum for norm in norms(model)} == {0.03}


def test_nan_is_named(model, images):
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"statistics of model\.0\.bn are NaN"):
        reestimate_batchnorm(model, [images])
