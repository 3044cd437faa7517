"""The smallest weights become zero, exactly as many as requested, and stay zero through training, folding and rounding."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from ultralytics.nn.tasks import DetectionModel

from tests.unit.prune.test_graph import lively
from yolo_compress.errors import RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.nets.families import check_prunable
from yolo_compress.prune import masks
from yolo_compress.prune.masks import HoldZeros, convolutions, sparsity_of, two_four, unstructured


@pytest.fixture(scope="module")
def nano():
    return lively(nc=2).float()


def test_images_outputs_and_dfl_stay_dense(nano):
    every = {name for name, module in nano.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(convolutions(nano)) == every - {"model.0.conv", *check_prunable(nano).outputs}


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_smallest_weights_go(nano, scope, share):
    found = unstructured(nano, share, scope)
    weights = {name: conv.weight.detach().abs() for name, conv in convolutions(nano).items()}
    gone = {name: int((~mask).sum()) for name, mask in found.items()}
    if scope == "global":
        assert sum(gone.values()) == round(share * sum(values.numel() for values in weights.values()))
    else:
        assert gone == {name: round(share * values.numel()) for name, values in weights.items()}
    for name, values in weights.items():
        assert not gone[name] or values[found[name]].min() >= values[~found[name]].max()


@pytest.mark.slow
def test_global_is_lamp_and_knows_no_scale(nano):
    """Energy divided by that of all weights of the layer that are not smaller. Of equal weights the first count as larger."""
    found = unstructured(nano, 0.6, "global")
    kept, lost = [], []
    for name, conv in convolutions(nano).items():
        energy = conv.weight.detach().double().square().flatten().numpy()
        ascending = np.sort(energy)
        rest = ascending[::-1].cumsum()[::-1]
        first, last = np.searchsorted(ascending, energy), np.searchsorted(ascending, energy, side="right") - 1
        keep = found[name].flatten().numpy()
        kept.append((energy / rest[last])[keep])
        lost.append((energy / rest[first])[~keep])
    assert np.concatenate(kept).min() >= np.concatenate(lost).max()
    scaled = copy.deepcopy(nano)
    scaled.model[4].cv1.conv.weight.data.mul_(128)  # its BatchNorm cancels this factor
    again = unstructured(scaled, 0.6, "global")
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_equal_magnitudes_are_counted_exactly(nano):
    flat = copy.deepcopy(nano)
    for conv in convolutions(flat).values():
        nn.init.constant_(conv.weight, -0.5)
    assert all(bool(mask.flatten()[: int(mask.sum())].all()) for mask in unstructured(flat, 0.25).values()), (
        "first stay"
    )
    found = unstructured(flat, 0.25, "global")
    assert sum(int((~mask).sum()) for mask in found.values()) == round(0.25 * sum(m.numel() for m in found.values()))


def test_two_of_four_input_channels_by_hand():
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    weight = model.model[1].conv.weight
    with torch.no_grad():
        weight.zero_()
        weight[0, :8, 1, 2] = torch.tensor([1.0, -4.0, 3.0, 2.0, 0.1, 0.2, -0.4, 0.3])
        weight[0, 8:12, 1, 2] = torch.tensor([-1.0, 1.0, 1.0, -1.0])  # of equal weights the first stay
    mask = two_four(model)["model.1.conv"]
    assert mask[0, :8, 1, 2].tolist() == [False, True, True, False, False, False, True, True]
    assert mask[0, 8:12, 1, 2].tolist() == [True, True, False, False]
    assert set(two_four(model)) == set(convolutions(model))  # all widths inside YOLOv8n are multiples of four
    for found in two_four(model).values():
        fours = found.reshape(found.shape[0], -1, 4, *found.shape[2:])
        assert (fours.sum(2) == 2).all()


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
])  # fmt: skip
def test_zeros_stay_exactly_zero_in_model_and_ema(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        for conv in (model[0], model[3]):
            conv.weight[torch.rand_like(conv.weight) < 0.5] = 0.0
    before = [conv.weight == 0 for conv in (model[0], model[3])]
    hook, steps = HoldZeros(), optimizer(model.parameters())
    hook.on_model(model)
    ema = copy.deepcopy(model.state_dict())
    for _ in range(5):
        steps.zero_grad()
        model(torch.randn(2, 4, 8, 8)).square().mean().backward()
        hook.before_step(model)
        steps.step()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                ema[name] = 0.9 * ema[name] + 0.1 * value
    for conv, prefix, mask in zip((model[0], model[3]), ("0", "3"), before, strict=True):
        assert torch.equal(conv.weight == 0, mask) and bool(mask.any())
        assert torch.equal(ema[f"{prefix}.weight"] == 0, mask)


def test_true_zeros_reach_the_onnx_file(nano, tmp_path):
    sparse = copy.deepcopy(nano)
    masks.apply(sparse, two_four(sparse))
    export_onnx(sparse, tmp_path / "a.onnx", (64, 64), names=("a", "b"))
    weights = {w.name: numpy_helper.to_array(w) for w in onnx.load(str(tmp_path / "a.onnx")).graph.initializer}
    for name in two_four(sparse):
        share = float((weights[f"{name}.weight"] == 0).mean())
        assert share == 0.5, name
    assert 0.4 < sparsity_of(sparse) < 0.5 and sparsity_of(nano) == 0


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_sparsity_is_a_share(nano, share):
    with pytest.raises(RecipeError, match="sparsity must lie between 0 and 1"):
        unstructured(nano, share)


def test_a_fused_model_is_refused():
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False).eval().fuse(verbose=False)
    with pytest.raises(RecipeError, match="fused"):
        two_four(model)
