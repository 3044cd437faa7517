"""Sensitivity measures the pruned model without removing channels, restores the model, and caps sensitive groups."""

import copy

import pytest
import torch

from tests.unit.prune.test_graph import lively
from yolo_compress.errors import NumericsError
from yolo_compress.files.csv_text import csv_text
from yolo_compress.prune import sensitivity
from yolo_compress.prune.calibration_stats import input_moments
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.reconstruct import reconstruct


@pytest.fixture(scope="module", params=["yolov8"])
def net(request):
    model = lively(nc=2, family=request.param)
    groups = prunable(model)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.width, generator=generator) for group in groups}
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=generator)
    return model, groups, scores, images


def keep_of(members, scores, ratio):
    return {
        group.name: scores[group.name].topk(max(1, round((1 - ratio) * group.steps)) * group.step).indices.sort().values
        for group in members
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("net", "name"),
    [
        *(("yolov8", name) for name in ("model.4.cv1", "model.9.cv1", "model.22.cv2.0.0", "model.6.m.1.cv1")),
        *(("yolo11", name) for name in ("model.10.cv1", "model.16.cv2", "model.6.m.0.cv1")),
        *(("yolo26", name) for name in ("model.22.cv1", "model.8.cv2", "model.23.one2one_cv2.0.0")),
    ],
    indirect=["net"],
)
@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.slow
def test_thinned_is_pruned(net, name, rebuilt):
    model, groups, scores, images = net
    members = sensitivity.ties(groups)[name]
    moments = input_moments(model, groups, [images]) if rebuilt else None
    keep = keep_of(members, scores, 0.5)
    pruned = copy.deepcopy(model)
    if moments:
        reconstruct(pruned, members, keep, moments)
    prune(pruned, keep)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with sensitivity.thinned(model, members, scores, 0.5, moments):
        got = model(images)[0]
    assert (got - pruned(images)[0]).abs().max() < 1e-9
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_measure_resumes_and_stops_at_nan(net):
    model, groups, scores, _ = net
    asked = []
    done = {name: [1.0, 1.0, 1.0] for name in list(sensitivity.ties(groups))[:-2]}

    def value(_):
        asked.append(1)
        return float(len(asked))

    found = sensitivity.measure(model, groups, scores, None, value, dict(done), lambda: None)
    assert len(asked) == 6 and list(found) == list(sensitivity.ties(groups))
    with pytest.raises(NumericsError, match=r"NaN or infinite with model\.22\.cv3"):
        sensitivity.measure(model, groups, scores, None, lambda _: float("nan"), dict(done), lambda: None)


def test_caps_by_hand():
    rows = {
        "robust": [1.0, 1.0, 1.05],
        "halfway": [1.0, 1.2, 3.0],
        "at once": [2.0, 3.0, 4.0],
        "better": [0.5, 0.6, 1.3],
    }
    caps = sensitivity.caps(rows, 1.0, 0.1, higher_is_better=False)
    assert caps["robust"] == 0.75 and caps["halfway"] == pytest.approx(0.375)
    assert caps["at once"] == pytest.approx(0.025) and caps["better"] == pytest.approx(0.5 + 0.25 * 0.5 / 0.7)
    falls = sensitivity.caps({"a": [0.6, 0.5, 0.1]}, 0.6, 0.25, higher_is_better=True)
    assert falls["a"] == pytest.approx(0.5 + 0.25 * 0.05 / 0.4)


def test_least_widths_of_caps(net):
    _, groups, _, _ = net
    cap = {name: 0.3 for name in sensitivity.ties(groups)}
    least = sensitivity.least(groups, cap)
    assert all(0.7 * group.width <= least[group.name] < 0.7 * group.width + 1 for group in groups)


def test_csv():
    found = {"measure": "loss", "dense": 1.5, "ratios": [0.25, 0.5], "groups": {"a": [1.6, 2.0]}, "caps": {"a": 0.4}}
    assert csv_text(sensitivity.rows(found)) == "group,loss_at_0.25,loss_at_0.5,cap\ndense,1.5,1.5,\na,1.6,2,0.4\n"
