"""A teacher as a training hook: soft labels and aligned Detect inputs, active by assertion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.distill.feature import weighted_l2
from yolo_compress.distill.logits import soft_labels, soft_sides, teacher_weight
from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.hook import TrainHook


class Teach(TrainHook):
    """Pulls a student towards a frozen teacher.

    Losses by name: `kd_feature`, the score-weighted L2 between the three Detect inputs, the student's aligned by a 1x1
    convolution; `kd_class`, Hinton's soft labels on the class logits; `kd_box`, the distributions of box sides. The teacher
    sees the very batch of the student, under `no_grad` (not `inference_mode`, whose tensors cannot enter a loss), in
    evaluation mode, so its BatchNorm stays.

    Args:
        teacher: Stock detector with the student's classes and strides.
        feature_weight: Weight of `kd_feature`; 0 leaves it out.
        class_weight: Weight of `kd_class`, Hinton's alpha included; 0 leaves it out.
        box_weight: Weight of `kd_box`; 0 leaves it out.
        temperature: T of the soft class labels; box sides are taken as they are (T = 1).

    Raises:
        RecipeError: Teacher and student differ in classes, strides or number of levels.
        NumericsError: A term was 0 for a whole epoch, that is, teaches nothing.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        feature_weight: float,
        class_weight: float,
        box_weight: float = 0.0,
        temperature: float,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weights = {"kd_feature": feature_weight, "kd_class": class_weight, "kd_box": box_weight}
        self.temperature = temperature
        self.aligners = nn.ModuleDict()
        self.totals: dict[str, Tensor] = {}

    def on_model(self, model: nn.Module) -> None:
        check_pair(model, self.teacher)
        device = next(model.parameters()).device
        self.teacher.to(device)
        if self.weights["kd_feature"]:
            pairs = zip(_detect_widths(model), _detect_widths(self.teacher), strict=True)
            for level, (student_width, teacher_width) in enumerate(pairs):
                aligner = nn.Conv2d(student_width, teacher_width, 1)
                nn.init.dirac_(aligner.weight)  # the identity where widths agree: equal nets start at a loss of 0
                nn.init.zeros_(aligner.bias)  # type: ignore[arg-type]
                self.aligners[str(level)] = aligner

    def modules(self) -> nn.ModuleDict:
        return self.aligners

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        self.totals = {}

    def extra_loss(self, batch: Mapping[str, Any], predictions: Any) -> dict[str, Tensor]:
        if not isinstance(predictions, dict):  # a validation pass: nothing to teach
            return {}
        with torch.no_grad():
            taught = self.teacher(batch["img"])[1]
            weight_BA = teacher_weight(taught["scores"])
        losses: dict[str, Tensor] = {}
        if self.weights["kd_feature"]:
            losses["kd_feature"] = self._feature(predictions["feats"], taught["feats"], weight_BA)
        if self.weights["kd_class"]:
            losses["kd_class"] = soft_labels(predictions["scores"], taught["scores"], weight_BA, self.temperature)
        if self.weights["kd_box"]:
            losses["kd_box"] = soft_sides(predictions["boxes"], taught["boxes"], weight_BA, temperature=1.0)
        losses = {name: self.weights[name] * value for name, value in losses.items()}
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach()
        return losses

    def _feature(self, student: Sequence[Tensor], teacher: Sequence[Tensor], weight_BA: Tensor) -> Tensor:
        weights = torch.split(weight_BA, [feat.shape[-2] * feat.shape[-1] for feat in teacher], dim=1)
        terms = [
            weighted_l2(self.aligners[str(level)](own), other, weight.view(own.shape[0], 1, *own.shape[-2:]))
            for level, (own, other, weight) in enumerate(zip(student, teacher, weights, strict=True))
        ]
        return torch.stack(terms).sum()

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        silent = [name for name, total in self.totals.items() if float(total) == 0.0]
        if silent:
            raise NumericsError(
                f"{', '.join(silent)} was 0 in every batch of epoch {epoch + 1}: teacher and student are the same net, "
                "or the teacher sees nothing in these images"
            )
        return {}


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raises RecipeError when a teacher cannot teach this student; names what differs."""
    own, other = student.model[-1], teacher.model[-1]  # type: ignore[index]
    facts = {
        "classes": (list(student.names.values()), list(teacher.names.values())),  # type: ignore[union-attr,operator]
        "strides": (own.stride.tolist(), other.stride.tolist()),
        "levels": (own.nl, other.nl),
    }
    for what, (mine, yours) in facts.items():
        if mine != yours:
            raise RecipeError(f"teacher and student differ in {what}: student {mine}, teacher {yours}")


def _detect_widths(model: nn.Module) -> list[int]:
    """Channels of the three maps that enter Detect."""
    return [int(branch[0].conv.in_channels) for branch in model.model[-1].cv2]  # type: ignore[index,union-attr]
