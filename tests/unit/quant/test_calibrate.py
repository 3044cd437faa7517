"""Each calibrator minimises its error, which the tests compute from the values instead of a histogram."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from tests.support.given import find
from yolo_compress.errors import DataError, NumericsError, RecipeError
from yolo_compress.quant.calibrate import CALIBRATORS, Histogram, ptq
from yolo_compress.quant.plan import plan
from yolo_compress.quant.ranges import AMAX_FLOOR, QMAX, before_silu
from yolo_compress.recipe.knob_types import Calibrator

COUNT = 100_000


def values(kind):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(COUNT, generator=generator)
    return {
        "gaussian": normal,
        "uniform": torch.rand(COUNT, generator=generator) * 2 - 1,
        "outlier": torch.cat([normal, torch.tensor([12.0])]),
        "silu": nn.functional.silu(normal * 4),
        "laplace": normal.sign() * -torch.log(torch.rand(COUNT, generator=generator) + 1e-7),
    }[kind]


def histogram(x):
    seen = Histogram()
    for part in x.split(COUNT // 4):
        seen.collect(part, float(part.abs().max()))
    return seen


def amax(method, x, percentile=99.99):
    return CALIBRATORS[method](histogram(x), percentile)


def squared_error(x, range_):
    step = range_ / QMAX
    return float((((x / step).round().clamp(-QMAX, QMAX) * step - x).double() ** 2).mean())


def tiny_model():
    torch.manual_seed(0)
    config = yaml_model_load("yolov8n.yaml")
    config["scales"]["n"] = [0.33, 0.125, 1024]
    model = DetectionModel(config, nc=3, verbose=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def images(count=4, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def recorded(model, module, x, before=False):
    """Record the inputs or outputs of a module with an independent hook."""
    seen = []
    target = model.get_submodule(module)
    if before:
        handle = target.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = target.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return float(seen[0].abs().max())


def test_the_recipe_offers_exactly_the_calibrators():
    assert set(get_args(Calibrator)) == set(CALIBRATORS)


def test_histogram_counts_every_value_in_the_bin_that_holds_it():
    x = torch.cat([torch.linspace(0, 1, 1001), torch.linspace(-5, 5, 10001)])  # the range grows: bins merge three times
    seen = Histogram()
    seen.collect(x[:1001], 1.0)
    seen.collect(x[1001:], 5.0)
    assert seen.counts.sum() == len(x) and seen.amax == 5.0 and seen.top == 8.0
    counts, edges = seen.used()
    assert edges[0] == 0 and edges[-2] <= 5.0 <= edges[-1]
    exact, _ = np.histogram(x.abs().double().numpy(), bins=edges)
    assert np.abs(counts - exact).max() <= 2, "float32 may move a value on an edge to the neighbour"
    assert np.abs(np.cumsum(counts - exact)).max() <= 2


def test_histogram_memory_does_not_grow_with_a_dark_first_image():
    seen = Histogram()
    seen.collect(torch.tensor([1e-4]), 1e-4)
    seen.collect(torch.tensor([1e4]), 1e4)
    assert len(seen.counts) == Histogram.BINS and seen.counts.sum() == 2


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "outlier", "silu", "laplace"])
def test_max_is_the_maximum(kind):
    assert amax("max", values(kind)) == float(values(kind).abs().max())


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "outlier", "silu", "laplace"])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
def test_percentile_is_numpys_to_a_bin(kind, percentile):
    x = values(kind)
    seen = histogram(x)
    expected = np.percentile(x.abs().double().numpy(), percentile)
    assert abs(amax("percentile", x, percentile) - expected) <= 2 * seen.top / Histogram.BINS


@pytest.mark.fault(39)
def test_percentile_ignores_an_outlier_and_full_percentile_does_not():
    x = values("outlier")
    assert amax("percentile", x) < 4.6
    assert amax("percentile", x, 100.0) >= 12.0


def test_percentile_of_a_mostly_zero_tensor_is_not_zero():
    x = torch.zeros(COUNT)
    x[0] = 1.0
    assert 0 < amax("percentile", x) <= 1 / 1000


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "outlier", "silu", "laplace"])
def test_mse_is_the_least_of_a_brute_force_search(kind):
    x = values(kind)
    largest = float(x.abs().max())
    least = min(squared_error(x, largest * i / 300) for i in range(30, 301, 2))
    assert squared_error(x, amax("mse", x)) <= 1.02 * least


def test_mse_keeps_a_uniform_range_and_clips_a_tail():
    assert amax("mse", values("uniform")) > 0.99
    assert 3.0 < amax("mse", values("gaussian")) < 4.5
    assert 3.0 < amax("mse", values("outlier")) < 9.0  # of 12: a compromise, which the search above confirms


def test_entropy_keeps_a_uniform_range_and_clips_a_tail():
    assert amax("entropy", values("uniform")) > 0.95
    assert 2.5 < amax("entropy", values("gaussian")) < 5.0
    assert 2.5 < amax("entropy", values("outlier")) < 6.0


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_an_image_without_dark_pixels_keeps_its_range(method):
    """256 values leave most bins empty, and all of the lowest: ModelOpt 0.47 then gives 0.06 ("mse", "entropy")."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(COUNT, generator=generator) * 40 + 160).round().clamp(40, 255)
    assert amax(method, codes / 255) > 0.95


def test_ranges_are_those_of_the_tensors_they_are_named_after():
    model, x = tiny_model(), images()
    state = ptq(model, lambda: [x], "max")
    placed = plan(model)
    assert (state.convs, tuple(state.activations)) == (placed.convs, placed.tensors)
    assert not state.folded and state.method == "max"
    assert state.activations["images"] == float(x.max())
    assert state.activations["model.0"] == recorded(model, "model.0", x), "behind SiLU"
    joined = [recorded(model, name, x) for name in ("model.2.cv1", "model.2.m.0.cv2", "model.2.m.0")]
    assert {state.activations[name] for name in placed.group_of("model.2.m.0").tensors} == {max(joined)}
    neck = [recorded(model, name, x) for name in ("model.4.cv2", "model.12.cv2", "model.16")]
    assert state.activations["model.16"] == state.activations["model.4.cv2"] == max(neck)
    assert tuple(state.outputs) == placed.convs
    assert state.outputs["model.0.conv"] == recorded(model, "model.0.bn", x), "behind BatchNorm, before SiLU"
    weight = model.model[0].conv.weight.detach()
    assert state.weights["model.0.conv"] == tuple(weight.abs().amax((1, 2, 3)).tolist())


def test_batches_stream_and_the_model_is_left_as_it_was():
    model = tiny_model()
    model.train()
    model.model[3].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole = ptq(model, lambda: [images(4)], "max")
    parts = ptq(model, lambda: images(4).split(1), "max")
    assert parts.activations == pytest.approx(whole.activations, rel=1e-5)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_no_range_passes_the_largest_value(method):
    model = tiny_model()
    largest, state = (ptq(model, lambda: [images()], kind) for kind in ("max", method))
    for name, amax_ in state.activations.items():
        assert 0.02 * largest.activations[name] < amax_ <= largest.activations[name], name


@pytest.mark.fault(39)
def test_a_silent_tensor_gets_the_floor_and_a_warning():
    with pytest.warns(UserWarning, match=r"images is 0 on every image"):
        state = ptq(tiny_model(), lambda: [torch.zeros(1, 3, 64, 64)], "mse")
    assert state.activations["images"] == np.float32(AMAX_FLOOR)


@pytest.mark.fault(39)
def test_a_dead_output_channel_gets_the_floor():
    model = tiny_model()
    with torch.no_grad():
        model.model[0].conv.weight[1] = 0
    assert ptq(model, lambda: [images(1)], "max").weights["model.0.conv"][1] == pytest.approx(AMAX_FLOOR)


@pytest.mark.fault(17)
def test_calibration_errors_name_the_cause():
    model = tiny_model()
    with pytest.raises(RecipeError, match="'minmax' is unknown, expected one of max, percentile, mse, entropy"):
        ptq(model, lambda: [images(1)], "minmax")
    with pytest.raises(DataError, match="no image"):
        ptq(model, lambda: [])
    broken = images(1)
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"images contains NaN"):
        ptq(model, lambda: [broken])
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks go after a failure too"
    with torch.no_grad():
        model.model[22].cv3[0][0].conv.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.22\.cv3\.0\.0"):
        ptq(model, lambda: [images(1)], "max")


@pytest.mark.real
def test_a_trained_net_keeps_its_first_range_under_every_calibrator():
    """All later layers depend on the range of the image; "mse" once gave 0.06, and the model detected nothing."""
    from yolo_compress.train import checkpoint

    model = checkpoint.load_model(find("YOLO_COMPRESS_WEIGHTS", "yolov8n_bccd.pt")).float()
    x = nn.functional.interpolate(images(2), size=(160, 160), mode="bicubic").clamp(0, 1).mul(255).round().div(255)
    for method in CALIBRATORS:
        state = ptq(model, lambda: [x], method)
        assert state.activations["images"] > 0.8 * float(x.max()), method


@pytest.mark.parametrize(("amax", "output_amax"), [(100.0, 4.0), (2.5, 2.0), (50.0, 0.3)])
def test_the_values_before_a_silu_represent_what_its_output_keeps(amax, output_amax):
    """As fine as 255 steps allow, yet no value is lost that the output's own pair keeps, but for SiLU(-6)."""
    scale, zero = before_silu(amax, output_amax)
    x = np.linspace(-amax, amax, 100_001)
    stored = (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale

    def silu(values):
        return np.minimum(values / (1 + np.exp(-values)), output_amax)

    assert np.abs(silu(stored) - silu(x)).max() <= 1.1 * scale / 2 + 0.0149
    assert scale <= (6 + 1.02 * output_amax + 0.3) / 255
    assert 0 <= zero <= 255 and stored[np.abs(x).argmin()] == 0
