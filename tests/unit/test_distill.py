"""A teacher pulls, is not pulled, and is silent only towards its equal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from yolo_compress import ultra
from yolo_compress.distill.feature import FEATURE_LOSSES, weighted_l2
from yolo_compress.distill.logits import soft_labels, soft_sides, teacher_weight
from yolo_compress.distill.teach import Teach, check_pair
from yolo_compress.errors import NumericsError, RecipeError

NAMES = ["a", "b", "c"]


def model(seed: int, yaml: str = "yolov8n.yaml", names: list[str] = NAMES):
    return ultra.new_model(yaml, names, 3, seed)


def test_soft_labels_are_zero_for_equal_logits_and_positive_otherwise() -> None:
    logits = torch.randn(2, 3, 50)
    weight = torch.rand(2, 50)
    assert float(soft_labels(logits, logits, weight, 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(soft_labels(logits + 0.5, logits, weight, 2.0)) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_gradient_of_soft_labels_is_the_one_of_the_docstring(temperature: float) -> None:
    student = torch.randn(1, 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 7, dtype=torch.float64)
    weight = torch.ones(1, 7, dtype=torch.float64)
    soft_labels(student, teacher, weight, temperature).backward()
    pull = temperature * ((student / temperature).sigmoid() - (teacher / temperature).sigmoid()) / 7
    torch.testing.assert_close(student.grad, pull.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_of_soft_sides_is_that_of_four_softmaxes(temperature: float) -> None:
    """T (p_student - p_teacher), a mean over sides: bins of different sides do not mix, sides lie one behind the other."""
    student = torch.randn(1, 4 * 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 4 * 5, 7, dtype=torch.float64)
    weight = torch.rand(1, 7, dtype=torch.float64)
    soft_sides(student, teacher, weight, temperature).backward()
    p = [torch.cat([(side / temperature).softmax(1) for side in z.split(5, 1)], 1) for z in (student.detach(), teacher)]
    expected = temperature * (p[0] - p[1]) / 4 * weight[:, None] / weight.sum()
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)
    assert float(soft_sides(teacher, teacher, weight, temperature)) == pytest.approx(0.0, abs=1e-12)


def test_a_high_temperature_keeps_the_pull() -> None:
    """T^2: in the limit the gradient is (student - teacher) / 4, whatever T."""
    student = torch.tensor([[[0.3]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[-0.2]]], dtype=torch.float64)
    soft_labels(student, teacher, torch.ones(1, 1, dtype=torch.float64), 1000.0).backward()
    assert float(student.grad) == pytest.approx(0.5 / 4, rel=1e-3)


def test_weight_keeps_background_out() -> None:
    teacher = torch.tensor([[[4.0, -8.0]]])
    student = teacher + torch.tensor([[[0.0, 3.0]]])
    sure = soft_labels(student, teacher, teacher_weight(teacher), 1.0)
    flat = soft_labels(student, teacher, torch.ones(1, 2), 1.0)
    assert float(sure) < 0.01 * float(flat)


def test_weighted_l2_equals_ultralytics() -> None:
    from ultralytics.nn.distill_model import DistillationModel

    student, teacher, weight = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6), torch.rand(2, 1, 5, 6)
    theirs = DistillationModel.loss_sl2(SimpleNamespace(), student, teacher, 0, (weight.flatten(2),))
    assert float(weighted_l2(student, teacher, weight)) == pytest.approx(float(theirs), abs=1e-6)
    assert FEATURE_LOSSES["weighted_l2"] is weighted_l2


def batch() -> dict[str, torch.Tensor]:
    return {"img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


def losses(student, teacher) -> tuple[Teach, dict[str, torch.Tensor]]:
    hook = Teach(teacher, feature_weight=1.0, class_weight=1.0, temperature=2.0)
    hook.on_model(student)
    return hook, hook.extra_loss(batch(), student(batch()["img"]))


def test_equal_nets_give_zero_and_different_ones_do_not() -> None:
    student = model(0).eval()  # in evaluation mode both normalise alike; the head's dictionary is the second of a pair
    hook = Teach(model(0), feature_weight=1.0, class_weight=1.0, temperature=2.0)
    hook.on_model(student)
    equal = hook.extra_loss(batch(), student(batch()["img"])[1])
    assert {name: pytest.approx(0.0, abs=1e-6) for name in ("kd_feature", "kd_class")} == {
        k: float(v.detach()) for k, v in equal.items()
    }
    _, different = losses(model(1).train(), model(0))
    assert all(torch.isfinite(value) and float(value.detach()) > 1e-4 for value in different.values())


def test_gradient_reaches_the_student_and_nothing_of_the_teacher_moves() -> None:
    student, teacher = model(1).train(), model(0, "yolov8s.yaml")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    hook, named = losses(student, teacher)
    sum(named.values()).backward()
    assert student.model[0].conv.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in hook.modules().parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_aligners_have_the_live_widths() -> None:
    student, teacher = model(1).train(), model(0, "yolov8s.yaml")
    hook, _ = losses(student, teacher)
    assert [(a.in_channels, a.out_channels) for a in hook.modules().values()] == [(64, 128), (128, 256), (256, 512)]


def test_nothing_is_taught_in_validation() -> None:
    hook = Teach(model(0), feature_weight=1.0, class_weight=1.0, temperature=2.0)
    student = model(1).eval()
    hook.on_model(student)
    assert hook.extra_loss(batch(), student(batch()["img"])) == {}


def test_a_term_that_is_zero_for_an_epoch_stops_the_run() -> None:
    hook = Teach(model(0), feature_weight=1.0, class_weight=1.0, temperature=2.0)
    hook.totals = {"kd_class": torch.zeros(()), "kd_feature": torch.ones(())}
    with pytest.raises(NumericsError, match="kd_class was 0 in every batch of epoch 3"):
        hook.on_epoch_end(2, model(1))


def test_other_classes_are_refused_with_both_lists() -> None:
    with pytest.raises(RecipeError, match=r"differ in classes: student \['a', 'b', 'c'\], teacher \['a', 'c', 'b'\]"):
        check_pair(model(0), model(0, names=["a", "c", "b"]))
