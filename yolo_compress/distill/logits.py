"""Distillation losses on the outputs of a Detect head: class scores (sigmoid) and box sides.

YOLOv8 and YOLO11 predict the length of a box side as a distribution over R bins. YOLO26 predicts the length itself: then R is 1.

Shapes: logits_BCA (batch, classes, anchors), sides_BDA (batch, 4 sides x R bins, anchors), weight_BA.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_compress.nets.detect import BranchOutputs

EPSILON = 1e-9
SIDES = 4  # left, top, right, bottom


def soft_labels(student_BCA: Tensor, teacher_BCA: Tensor, weight_BA: Tensor, temperature: float) -> Tensor:
    """Return Hinton's distillation loss (arXiv 1503.02531, section 2) for sigmoid scores, with one Bernoulli per class.

    With p = sigmoid(z / T) the term of a class is T^2 * KL(p_teacher || p_student). The gradient of this term by the student's logit
    is T * (p_student - p_teacher). For large T the gradient tends to (z_student - z_teacher) / 4, independent of T. The weight of the
    loss therefore does not have to be tuned again for another temperature. The KL divergence is the binary cross-entropy minus the
    teacher's entropy, which is a constant. For equal models the loss is 0.

    Args:
        student_BCA: Student's class logits.
        teacher_BCA: Teacher's class logits, without gradient.
        weight_BA: Weight of each anchor, for example the teacher's best score, so that the background does not dominate.
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
    """Return the localisation distillation loss (Zheng et al., arXiv 2102.12252, equation 4) on the DFL bins of box sides.

    A narrow distribution shows that the teacher is certain. With p = softmax(z / T) the term of a side is
    T^2 * KL(p_teacher || p_student); see `soft_labels` for the factor T^2.

    Without bins (R = 1) there is no distribution. The term of a side is then the absolute difference of the lengths, in cells. In the
    same way, Ultralytics trains such a head with an L1 loss in place of DFL.

    Args:
        student_BDA: Student's logits in the order of Detect: all bins of the first side, then all bins of the second, and so on.
        teacher_BDA: Teacher's logits, without gradient.
        weight_BA: Weight of each anchor, for example the teacher's best score.
        temperature: T >= 1. Without bins it has no effect.

    Returns:
        Scalar: the mean over the four sides, averaged over anchors by their weight; 0 for equal models.
    """
    if student_BDA.shape[1] == SIDES:
        difference_BA = (student_BDA - teacher_BDA).abs().mean(dim=1)
        return (difference_BA * weight_BA).sum() / (weight_BA.sum() + EPSILON)
    student_B4RA = student_BDA.unflatten(1, (4, -1)) / temperature
    teacher_B4RA = teacher_BDA.unflatten(1, (4, -1)) / temperature
    divergence_B4RA = F.kl_div(
        F.log_softmax(student_B4RA, dim=2), F.log_softmax(teacher_B4RA, dim=2), reduction="none", log_target=True
    )
    divergence_BA = divergence_B4RA.sum(dim=2).mean(dim=1) * temperature**2
    return (divergence_BA * weight_BA).sum() / (weight_BA.sum() + EPSILON)


def soft_boxes(student_BDA: Tensor, teacher_BDA: Tensor, weight_BA: Tensor) -> Tensor:
    """Return one minus the IoU between the decoded boxes of student and teacher, averaged over anchors (PP-YOLOE's third term).

    The distance from the anchor's centre to a box side is the mean over the bins, as Detect decodes it. This distance is above 0.
    Both boxes therefore contain the centre of the anchor and overlap, so the IoU always has a gradient, and GIoU is not necessary.
    The IoU is the same in cells as in px, so the positions of the anchors are not needed.

    Without bins a distance can be negative. Boxes that do not overlap have the IoU 0 and no gradient. They hardly occur at anchors
    where the teacher finds an object, and other anchors have little weight.

    Args:
        student_BDA: Student's logits in the order of Detect: all bins of the left side, then of the top, right and bottom side.
        teacher_BDA: Teacher's logits, without gradient.
        weight_BA: Weight of each anchor, for example the teacher's best score.

    Returns:
        Scalar in 0..1, averaged over anchors by their weight; 0 for equal boxes.
    """
    student_B4A, teacher_B4A = _sides(student_BDA), _sides(teacher_BDA)
    overlap_BA = _area(
        torch.minimum(student_B4A, teacher_B4A)
    )  # the right edge is min(r), the left edge max(-l) = -min(l)
    iou_BA = overlap_BA / (_area(student_B4A) + _area(teacher_B4A) - overlap_BA + EPSILON)
    return ((1.0 - iou_BA) * weight_BA).sum() / (weight_BA.sum() + EPSILON)


def _sides(logits_BDA: Tensor) -> Tensor:
    """Return the distances from the anchor's centre to the four sides of the decoded box, in cells."""
    if logits_BDA.shape[1] == SIDES:
        return logits_BDA
    share_B4RA = logits_BDA.unflatten(1, (4, -1)).softmax(dim=2)
    bins_R = torch.arange(share_B4RA.shape[2], device=share_B4RA.device, dtype=share_B4RA.dtype)
    return (share_B4RA * bins_R[:, None]).sum(dim=2)


def _area(sides_B4A: Tensor) -> Tensor:
    left, top, right, bottom = sides_B4A.unbind(dim=1)
    return (left + right).clamp(min=0) * (top + bottom).clamp(min=0)


def head_terms(
    student: BranchOutputs, teacher: BranchOutputs, weights: Mapping[str, float], temperature: float
) -> dict[str, Tensor]:
    """Return name -> unweighted loss term between two heads: `kd_class`, `kd_box` and `kd_iou`, if their weights are not 0.

    Args:
        student: Raw outputs of one branch of Detect: class logits `scores` and box sides or their logits `boxes`.
        teacher: The same for the teacher, without gradient. The teacher's best class scores are the weights of the anchors.
        weights: Name of the loss term -> its weight. Only whether a weight is 0 has an effect.
        temperature: Temperature of `kd_class`. The temperature of `kd_box` is 1.
    """
    scores, taught_scores = student["scores"].float(), teacher["scores"].float()
    boxes, taught_boxes = student["boxes"].float(), teacher["boxes"].float()
    weight_BA = teacher_weight(taught_scores)
    terms = {
        "kd_class": lambda: soft_labels(scores, taught_scores, weight_BA, temperature),
        "kd_box": lambda: soft_sides(boxes, taught_boxes, weight_BA, temperature=1.0),
        "kd_iou": lambda: soft_boxes(boxes, taught_boxes, weight_BA),
    }
    return {name: term() for name, term in terms.items() if weights[name]}


def teacher_weight(teacher_BCA: Tensor) -> Tensor:
    """Return the teacher's best class score of each anchor, (B, A) in 0..1."""
    return torch.amax(teacher_BCA.sigmoid(), dim=1)
