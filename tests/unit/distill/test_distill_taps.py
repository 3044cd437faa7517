"""Taps return the requested maps, keep no reference to them, and are removed when training ends."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from yolo_compress.distill.hook import Teach
from yolo_compress.distill.taps import Taps, map_shapes, matched_widths, shallow_to_deep, split_pairs
from yolo_compress.distill.teacher import Frozen
from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.train import checkpoint

NAMES = ["a", "b"]
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def nano() -> nn.Module:
    return checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return checkpoint.new_model("yolov8s.yaml", NAMES, 3, 1)


def hooks_of(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_the_maps_of_the_detect_inputs_are_those_that_detect_returns(nano: nn.Module) -> None:
    taps = Taps(detect.inputs(nano))
    taps.attach(nano)
    predictions = nano.train()(IMAGES)
    assert all(a is b for a, b in zip(taps.take(), predictions["feats"], strict=True))
    assert taps._outputs == {}, "take() releases the maps"
    taps.remove()
    assert hooks_of(nano) == 0


def test_pairs_by_name() -> None:
    assert split_pairs(["model.15", "model.18=model.21"]) == [("model.15", "model.15"), ("model.18", "model.21")]


def test_widths_are_measured_and_the_net_stays_as_it_was(nano: nn.Module, small: nn.Module) -> None:
    nano.train()
    nano.model[3].eval()
    before = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    pairs = split_pairs(["model.2", "model.15", "model.22.cv2.0.0=model.15"])
    assert matched_widths(nano, small, pairs) == [(32, 64), (64, 128), (64, 128)]
    assert all(torch.equal(before[name], tensor) for name, tensor in nano.state_dict().items())
    assert nano.training and nano.model[22].training and not nano.model[3].training and hooks_of(nano) == 0
    assert not {"anchors", "shape"} & set(vars(nano.model[-1])), "no anchors of the empty image are left behind"


@pytest.mark.parametrize(
    ("yaml", "levels"), [("yolov8m.yaml", 3), ("yolo11l.yaml", 3), ("yolov8n-p2.yaml", 4), ("yolov8n-p6.yaml", 4)]
)
def test_deep_and_shallow_layers_have_the_same_stride(yaml: str, levels: int) -> None:
    net = checkpoint.new_model(yaml, NAMES, 3, 0)
    assert len(matched_widths(net, net, shallow_to_deep(net))) == levels


def test_the_last_layer_of_each_stride_learns_from_the_input_of_the_head(nano: nn.Module) -> None:
    assert shallow_to_deep(nano) == [("model.4", "model.15"), ("model.6", "model.18"), ("model.9", "model.21")]
    eleven = checkpoint.new_model("yolo11n.yaml", NAMES, 3, 0)
    assert shallow_to_deep(eleven) == [("model.4", "model.16"), ("model.6", "model.19"), ("model.10", "model.22")]


def test_what_cannot_be_paired_names_both(nano: nn.Module, small: nn.Module) -> None:
    said = r"model.15 of the student is 8 x 8, model.18 of the teacher 4 x 4 on 64 px; pair layers of the same stride"
    with pytest.raises(RecipeError, match=said):
        matched_widths(nano, small, [("model.15", "model.18")])
    with pytest.raises(RecipeError, match=r"the teacher has no layer 'model.99'; its layers are model.0 to model.22"):
        matched_widths(nano, small, [("model.15", "model.99")])
    with pytest.raises(RecipeError, match=r"output of model.22 of the student \(Detect\) is not a feature map"):
        map_shapes(nano, ["model.22"], "student")


def test_a_layer_of_any_stride_gets_its_weights(nano: nn.Module, small: nn.Module) -> None:
    """model.2 has stride 4, finer than any level of the head."""
    student = deepcopy(nano).train()
    hook = Teach(Frozen(deepcopy(small)), feature_weight=1.0, class_weight=0.0, layers=["model.2", "model.12"])
    hook.on_model(student)
    hook.on_epoch_start(0, 1)
    losses = hook.extra_loss({"img": IMAGES}, student(IMAGES))
    assert list(losses) == ["kd_feature"] and float(losses["kd_feature"].detach()) > 0
    losses["kd_feature"].backward()
    assert student.model[15].cv1.conv.weight.grad is None, "nothing deeper than the taps is taught"
    assert student.model[12].cv1.conv.weight.grad.any()
    hook.on_end(student)
    assert hooks_of(student) == hooks_of(hook.source.net) == 0


@pytest.mark.fault(26)
def test_a_copy_made_before_training_carries_no_taps(nano: nn.Module, small: nn.Module) -> None:
    student = deepcopy(nano)
    hook = Teach(Frozen(deepcopy(small)), feature_weight=1.0, class_weight=0.0)
    hook.on_model(student)
    assert hooks_of(deepcopy(student)) == 0
    hook.on_end(student)  # a run that failed before its first epoch
