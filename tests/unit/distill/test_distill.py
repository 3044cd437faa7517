"""Distillation losses have a gradient to the student only, and are 0 only if student and teacher are equal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from yolo_compress.distill.checks import check_frozen, check_terms
from yolo_compress.distill.feature import weighted_l2
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.logits import head_terms, soft_boxes, soft_labels, soft_sides, teacher_weight
from yolo_compress.distill.teacher import Frozen
from yolo_compress.errors import NumericsError
from yolo_compress.train import checkpoint

NAMES = ["a", "b", "c"]
EVERY = {"feature_weight": 1.0, "class_weight": 1.0, "box_weight": 1.0, "iou_weight": 1.0}


def model(seed: int, yaml: str = "yolov8n.yaml"):
    return checkpoint.new_model(yaml, NAMES, 3, seed)


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
    """T (p_student - p_teacher), averaged over sides. Each side is a separate, contiguous block of bins."""
    student = torch.randn(1, 4 * 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 4 * 5, 7, dtype=torch.float64)
    weight = torch.rand(1, 7, dtype=torch.float64)
    soft_sides(student, teacher, weight, temperature).backward()
    p = [torch.cat([(side / temperature).softmax(1) for side in z.split(5, 1)], 1) for z in (student.detach(), teacher)]
    expected = temperature * (p[0] - p[1]) / 4 * weight[:, None] / weight.sum()
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-9)
    assert float(soft_sides(teacher, teacher, weight, temperature)) == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_does_not_depend_on_a_high_temperature() -> None:
    """With the factor T^2 the gradient tends to (student - teacher) / 4 for any large T."""
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


def test_soft_boxes_are_one_minus_the_iou_of_decoded_boxes() -> None:
    """Compared with Ultralytics' decoding at real anchors and its IoU of boxes in px."""
    from ultralytics.utils.metrics import bbox_iou
    from ultralytics.utils.tal import dist2bbox, make_anchors

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 64, 20, dtype=torch.float64) * 3
    weight = torch.rand(2, 20, dtype=torch.float64)
    points, stride = make_anchors([torch.zeros(2, 1, 4, 4).double(), torch.zeros(2, 1, 2, 2).double()], [8, 16], 0.5)

    def boxes(logits: torch.Tensor) -> torch.Tensor:
        sides = logits.view(2, 4, 16, 20).permute(0, 3, 1, 2).softmax(3) @ torch.arange(16.0, dtype=torch.float64)
        return dist2bbox(sides, points, xywh=False) * stride

    iou = bbox_iou(boxes(student), boxes(teacher), xywh=False, eps=0.0).squeeze(-1)
    expected = ((1 - iou) * weight).sum() / weight.sum()
    assert float(soft_boxes(student, teacher, weight)) == pytest.approx(float(expected), abs=1e-9)
    assert float(soft_boxes(teacher, teacher, weight)) == pytest.approx(0.0, abs=1e-9)


def test_boxes_without_bins_are_compared_by_their_lengths() -> None:
    """YOLO26 predicts lengths, which can be negative: boxes of no area, and boxes that do not overlap."""
    from ultralytics.utils.metrics import bbox_iou

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 200, dtype=torch.float64) + 1
    weight = torch.rand(2, 200, dtype=torch.float64)

    def boxes(sides: torch.Tensor) -> torch.Tensor:
        left, top, right, bottom = sides.unbind(1)
        return torch.stack([-left, -top, right, bottom], -1)

    real = ((student[:, :2] + student[:, 2:]).amin(1) > 0) & ((teacher[:, :2] + teacher[:, 2:]).amin(1) > 0)
    iou = bbox_iou(boxes(student), boxes(teacher), xywh=False, eps=0.0).squeeze(-1)
    expected = torch.where(real, 1 - iou, 1.0)
    assert 0.3 < real.double().mean() < 0.99 and (iou[real] == 0).any()
    got = torch.stack(
        [soft_boxes(student[:, :, i : i + 1], teacher[:, :, i : i + 1], weight[:, :1]) for i in range(200)]
    )
    mean = (expected * weight[:, :1]).sum(0) / weight[:, :1].sum()
    assert torch.allclose(got, mean, atol=1e-7)
    sides = soft_sides(student, teacher, weight, 1.0)
    assert float(sides) == pytest.approx(float(((student - teacher).abs().mean(1) * weight).sum() / weight.sum()))
    assert float(soft_sides(teacher, teacher, weight, 1.0)) == 0.0


def test_each_branch_of_an_end_to_end_head_learns_from_the_same_branch_with_the_weight_of_its_epoch() -> None:
    student, teacher = model(1, "yolo26n.yaml").train(), model(0, "yolo26n.yaml")
    hook = started(student, teacher, feature_weight=0.0)
    own, other = student(batch()["img"]), hook.source.outputs(batch()["img"], {})
    apart = {branch: head_terms(own[branch], other[branch], hook.weights, 2.0) for branch in ("one2many", "one2one")}
    for epoch, many in ((0, 0.8), (9, 0.1)):
        hook.on_epoch_start(epoch, 10)
        got = hook.extra_loss(batch(), own)
        assert list(got) == ["kd_class", "kd_box", "kd_iou"]
        for name, value in got.items():
            expected = many * apart["one2many"][name] + (1 - many) * apart["one2one"][name]
            assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    sum(got.values()).backward()
    for branch in ("cv2", "cv3", "one2one_cv2", "one2one_cv3"):
        assert student.get_submodule(f"model.23.{branch}.0.2").weight.grad.abs().sum() > 0, branch


def test_head_terms_without_weight_are_left_out() -> None:
    outputs = [{"scores": torch.randn(1, 3, 5), "boxes": torch.randn(1, 64, 5)} for _ in range(2)]
    weights = {"kd_class": 0.0, "kd_box": 1.0, "kd_iou": 2.0}
    assert list(head_terms(*outputs, weights, 1.0)) == ["kd_box", "kd_iou"]


def batch() -> dict[str, torch.Tensor]:
    return {"img": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


def started(student: nn.Module, teacher: nn.Module, **changes: object) -> Teach:
    hook = Teach(Frozen(teacher), **{**EVERY, "temperature": 2.0, **changes})  # type: ignore[arg-type]
    hook.on_model(student)
    hook.on_epoch_start(0, 10)
    return hook


def losses(student: nn.Module, teacher: nn.Module, **changes: object) -> tuple[Teach, dict[str, torch.Tensor]]:
    hook = started(student, teacher, **changes)
    return hook, hook.extra_loss(batch(), student(batch()["img"]))


def test_equal_nets_give_zero_and_different_ones_do_not() -> None:
    student = model(
        0
    ).eval()  # in evaluation mode both normalise alike; the dictionary of the head is the second output
    hook = started(student, model(0))
    equal = hook.extra_loss(batch(), student(batch()["img"])[1])
    assert {name: float(value.detach()) for name, value in equal.items()} == {
        name: pytest.approx(0.0, abs=1e-6) for name in ("kd_feature", "kd_class", "kd_box", "kd_iou")
    }
    _, different = losses(model(1).train(), model(0))
    assert len(different) == 4
    assert all(torch.isfinite(value) and float(value.detach()) > 1e-4 for value in different.values())


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    "pair",
    [
        ("yolov8n", "yolov8s"),
        ("yolo11n", "yolo11s"),
        ("yolo11n", "yolov8s"),
        ("yolov8n", "yolo11m"),
        ("yolo26n", "yolo26s"),
    ],
)
def test_gradient_reaches_the_student_and_nothing_of_the_teacher_moves(pair: tuple[str, str]) -> None:
    student, teacher = model(1, f"{pair[0]}.yaml").train(), model(0, f"{pair[1]}.yaml")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    hook, named = losses(student, teacher)
    sum(named.values()).backward()
    assert student.model[0].conv.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in hook.modules().parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_the_teacher_of_the_head_is_raw_and_its_scores_are_those_of_evaluation() -> None:
    """Only the flag of Detect is set, so its outputs are those of evaluation before decoding."""
    net = model(0).eval()
    with torch.no_grad():
        expected = net(batch()["img"])[1]["scores"]
    assert torch.equal(Frozen(net).outputs(batch()["img"], {})["scores"], expected)


def test_aligners_have_the_live_widths() -> None:
    student, teacher = model(1).train(), model(0, "yolov8s.yaml")
    hook = started(student, teacher)
    assert [(a.in_channels, a.out_channels) for a in hook.modules().values()] == [(64, 128), (128, 256), (256, 512)]


def test_there_are_no_terms_in_validation() -> None:
    student = model(1).eval()
    hook = started(student, model(0))
    assert hook.extra_loss(batch(), student(batch()["img"])) == {}


# --- schedule -------------------------------------------------------------------------------------------------------


def test_weights_rise_over_the_ramp_and_are_off_at_the_end() -> None:
    student, teacher = model(1).train(), model(0)
    hook = started(student, teacher, ramp_epochs=2, off_epochs=3, feature_weight=0.0)

    def term(epoch: int) -> float | None:
        hook.on_epoch_start(epoch, 10)
        value = hook.extra_loss(batch(), student(batch()["img"])).get("kd_class")
        return None if value is None else float(value.detach())

    full = term(1)
    assert term(0) == pytest.approx(full / 2, rel=1e-4) and term(6) == pytest.approx(full, rel=1e-4)
    assert term(7) is None and term(9) is None
    hook.on_epoch_end(9, student)  # an epoch without distillation raises no error


def test_in_the_epochs_without_terms_nothing_is_tapped() -> None:
    student = model(1).train()
    hook = started(student, model(0), off_epochs=3)
    assert taps_of(student) == taps_of(hook.source.net) == 3
    hook.on_epoch_start(7, 10)
    assert taps_of(student) == taps_of(hook.source.net) == 0


def taps_of(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


# --- checks ---------------------------------------------------------------------------------------------------------


def test_a_term_that_is_zero_for_an_epoch_stops_the_run() -> None:
    hook = Teach(Frozen(model(0)), **EVERY)
    hook.totals = {"kd_class": torch.zeros(()), "kd_feature": torch.ones(())}
    with pytest.raises(NumericsError, match="kd_class was 0 in every batch of epoch 3"):
        hook.on_epoch_end(2, model(1))


def test_checks_of_a_term_at_the_first_batch() -> None:
    outputs = torch.ones(3, requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    check_terms({"fine": outputs.sum()}, [outputs], same=False)
    check_terms({"tiny": 1e-30 * outputs.sum()}, [outputs], same=False)
    with pytest.raises(NumericsError, match="kd_box is nan at the first batch"):
        check_terms({"kd_box": outputs.sum() * float("nan")}, [outputs], same=False)
    with pytest.raises(NumericsError, match="kd_box is 0 at the first batch although teacher and student differ"):
        check_terms({"kd_box": 0 * outputs.sum()}, [outputs], same=False)
    check_terms({"kd_box": 0 * outputs.sum()}, [outputs], same=True)
    for stray in (other.sum(), outputs.detach().sum(), (outputs - outputs + other).sum()):
        with pytest.raises(NumericsError, match="kd_box has no gradient to the student"):
            check_terms({"kd_box": stray}, [outputs], same=False)


def test_terms_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.distill import hook as teach

    checked: list[list[str]] = []
    monkeypatch.setattr(teach, "check_terms", lambda terms, student, same: checked.append(list(terms)))
    student = model(1).train()
    hook = started(student, model(0))
    for _ in range(2):
        hook.extra_loss(batch(), student(batch()["img"]))
    assert checked == [["kd_feature", "kd_class", "kd_box", "kd_iou"]]


def test_a_feature_loss_of_ones_own_is_the_term(tmp_path: Path) -> None:
    """With twice the L2 distance the term is twice as large."""
    (tmp_path / "own.py").write_text(
        "def twice(student, teacher, weight):\n    return 2 * (student - teacher).square().mean()\n"
    )
    terms = []
    for name in ("fitnet", f"{tmp_path}/own.py:twice"):
        student = model(1).eval()
        hook = started(student, model(0), feature_loss=name)
        student.train()
        terms.append(float(hook.extra_loss(batch(), student(batch()["img"]))["kd_feature"].detach()))
    assert terms[1] == pytest.approx(2 * terms[0], rel=1e-5) and terms[0] > 0


def test_a_relation_of_one_image_is_refused_at_the_first_batch() -> None:
    student = model(1).train()
    hook = started(student, model(0), feature_loss="relation")
    single = {"img": batch()["img"][:1]}
    with pytest.raises(NumericsError, match="kd_feature .* at the first batch"):
        hook.extra_loss(single, student(single["img"]))


@pytest.mark.fault(38)
def test_a_teacher_that_can_change_is_a_bug() -> None:
    teacher = Frozen(model(0)).net
    check_frozen(teacher)
    with pytest.raises(AssertionError, match=r"the teacher is not frozen: \['model.0.bn'"):
        check_frozen(teacher.train())
    with pytest.raises(AssertionError, match=r"the teacher is not frozen: \['model.0.conv.weight'"):
        check_frozen(teacher.eval().requires_grad_(True))
