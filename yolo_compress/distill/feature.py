"""Feature losses between two maps of the same shape, the student's already aligned to the teacher's width.

Shapes: feat_BCHW, weight_B1HW.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

EPSILON = 1e-9  # keeps an image set without any teacher score finite


def weighted_l2(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Mean squared difference, each location weighted by how sure the teacher is that something is there.

    FitNets' hint loss (arXiv 1412.6550) with the weighting of Ultralytics' own distillation (`loss_sl2`, 8.4): without
    it the background, most of the map, decides.

    Returns:
        Scalar, 0 for equal maps.
    """
    squared = (student_BCHW - teacher_BCHW).square() * weight_B1HW
    return squared.sum() / (weight_B1HW.sum() * student_BCHW.shape[1] + EPSILON)


FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"weighted_l2": weighted_l2}
