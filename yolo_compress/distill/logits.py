"""Soft labels for the two branches of a YOLOv8 head: sigmoid class scores and distributions of box sides.

Shapes: logits_BCA (batch, classes, anchors), sides_BDA (batch, 4 sides x R bins, anchors), weight_BA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-9


def soft_labels(student_BCA: Tensor, teacher_BCA: Tensor, weight_BA: Tensor, temperature: float) -> Tensor:
    """Hinton's distillation loss (arXiv 1503.02531, section 2) in its binary form, one Bernoulli per class.

    With p = sigmoid(z / T) the term of one class is T^2 * KL(p_teacher || p_student). Its gradient by the student's
    logit is T * (p_student - p_teacher), and for large T that tends to (z_student - z_teacher) / 4: the T^2 keeps the
    pull independent of T, so a temperature can be tried without tuning the weight again. The KL differs from binary
    cross-entropy by the teacher's entropy, a constant, so that equal nets give 0.

    Args:
        student_BCA: Student's class logits.
        teacher_BCA: Teacher's class logits, without gradient.
        weight_BA: Weight of each anchor, such as the teacher's best score, so that background does not drown objects.
        temperature: T >= 1.

    Returns:
        Scalar: the sum over classes, averaged over anchors by their weight.
    """
    target = (teacher_BCA / temperature).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student_BCA / temperature, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_BCA / temperature, target, reduction="none")
    divergence_BA = (cross - entropy).sum(dim=1) * temperature**2
    return (divergence_BA * weight_BA).sum() / (weight_BA.sum() + EPSILON)


def soft_sides(student_BDA: Tensor, teacher_BDA: Tensor, weight_BA: Tensor, temperature: float) -> Tensor:
    """Localisation distillation (Zheng et al., arXiv 2102.12252, equation 4): the DFL bins of each box side as soft labels.

    YOLOv8 predicts a side as a distribution over R bins; how wide it is says how sure the teacher is of that edge. The
    term of a side is T^2 * KL(p_teacher || p_student) of softmax(z / T), T^2 for the reason given in `soft_labels`.

    Args:
        student_BDA: Student's logits, side-major as Detect returns them.
        teacher_BDA: Teacher's, without gradient.
        weight_BA: Weight of each anchor, such as the teacher's best score.
        temperature: T >= 1.

    Returns:
        Scalar: the mean over the four sides, averaged over anchors by their weight; 0 for equal nets.
    """
    student_B4RA = student_BDA.unflatten(1, (4, -1)) / temperature
    teacher_B4RA = teacher_BDA.unflatten(1, (4, -1)) / temperature
    divergence_B4RA = F.kl_div(
        F.log_softmax(student_B4RA, dim=2), F.log_softmax(teacher_B4RA, dim=2), reduction="none", log_target=True
    )
    divergence_BA = divergence_B4RA.sum(dim=2).mean(dim=1) * temperature**2
    return (divergence_BA * weight_BA).sum() / (weight_BA.sum() + EPSILON)


def soft_boxes(student_BDA: Tensor, teacher_BDA: Tensor, weight_BA: Tensor) -> Tensor:
    """One minus the IoU of the two decoded boxes of each anchor: the teacher's box as a target (PP-YOLOE's third term).

    A side is the expectation over its bins, as Detect decodes it, and above 0: both boxes hold the anchor's centre. They
    overlap, so that IoU has a gradient everywhere and needs no enclosing box (GIoU); and in cells of their level instead of
    px the ratio is the same, so that no anchor has to be placed.

    Args:
        student_BDA: Student's logits, side-major as Detect returns them: left, top, right, bottom.
        teacher_BDA: Teacher's, without gradient.
        weight_BA: Weight of each anchor, such as the teacher's best score.

    Returns:
        Scalar in 0..1, averaged over anchors by their weight; 0 for equal boxes.
    """
    student_B4A, teacher_B4A = _sides(student_BDA), _sides(teacher_BDA)
    overlap_BA = _area(torch.minimum(student_B4A, teacher_B4A))
    iou_BA = overlap_BA / (_area(student_B4A) + _area(teacher_B4A) - overlap_BA + EPSILON)
    return ((1.0 - iou_BA) * weight_BA).sum() / (weight_BA.sum() + EPSILON)


def _sides(logits_BDA: Tensor) -> Tensor:
    """Distances from the anchor's centre to the sides, in cells."""
    share_B4RA = logits_BDA.unflatten(1, (4, -1)).softmax(dim=2)
    bins_R = torch.arange(share_B4RA.shape[2], device=share_B4RA.device, dtype=share_B4RA.dtype)
    return (share_B4RA * bins_R[:, None]).sum(dim=2)


def _area(sides_B4A: Tensor) -> Tensor:
    left, top, right, bottom = sides_B4A.unbind(dim=1)
    return (left + right) * (top + bottom)


def head_terms(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weights: Mapping[str, float], temperature: float
) -> dict[str, Tensor]:
    """The terms between two heads whose weight is not 0, unweighted: `kd_class`, `kd_box` and `kd_iou`.

    Args:
        student: Raw outputs of Detect, `scores` and `boxes`.
        teacher: The same without gradient; its scores weight the anchors.
        weights: By name of a term.
        temperature: T of the class labels; box sides are taken as they are (T = 1).
    """
    own, other = ({name: outputs[name].float() for name in ("scores", "boxes")} for outputs in (student, teacher))
    weight_BA = teacher_weight(other["scores"])
    terms = {
        "kd_class": lambda: soft_labels(own["scores"], other["scores"], weight_BA, temperature),
        "kd_box": lambda: soft_sides(own["boxes"], other["boxes"], weight_BA, temperature=1.0),
        "kd_iou": lambda: soft_boxes(own["boxes"], other["boxes"], weight_BA),
    }
    return {name: term() for name, term in terms.items() if weights[name]}


def teacher_weight(teacher_BCA: Tensor) -> Tensor:
    """The teacher's best class score of each anchor, (B, A) in 0..1."""
    return torch.amax(teacher_BCA.sigmoid(), dim=1)
