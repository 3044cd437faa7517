"""Training hook for distillation: adds losses between student and teacher, with a schedule, and checks that each has an effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolo_compress.distill.checks import check_effect, check_terms, same_weights
from yolo_compress.distill.feature import Aligner
from yolo_compress.distill.feature import find as find_feature_loss
from yolo_compress.distill.logits import head_terms, teacher_weight
from yolo_compress.distill.taps import Taps, matched_widths
from yolo_compress.distill.teacher import Source
from yolo_compress.nets import detect
from yolo_compress.nets.detect import HeadOutputs
from yolo_compress.train.hook import TrainHook


class Teach(TrainHook):
    """Hook that adds distillation losses to the training of a student.

    `kd_feature` compares feature maps, `kd_class` class scores (Hinton's soft labels), `kd_box` the distributions of box sides,
    and `kd_iou` the decoded boxes of student and teacher. `peer` is the training loss of a teacher that learns together with the
    student. Each loss is logged as `train/<name>`, and its fraction of the total loss as `share/<name>`.

    With an end-to-end head, `kd_class`, `kd_box` and `kd_iou` are weighted sums over its branches: each branch learns from the same
    branch of the teacher, with the weight of its detection loss (`detect.branch_weights`). `kd_feature` weights locations by the
    scores of the one-to-many branches, since only these train the layers before the head.

    Args:
        source: The teacher, see `teacher.Source`.
        feature_weight: Weight of `kd_feature`; 0 disables it.
        class_weight: Weight of `kd_class`, already multiplied by `distill.alpha`; 0 disables it.
        box_weight: Weight of `kd_box`; 0 disables it.
        iou_weight: Weight of `kd_iou`; 0 disables it.
        temperature: Temperature of `kd_class`. The temperature of `kd_box` is 1.
        feature_loss: A key of `choices.FEATURE_LOSSES`, or `file.py:function`.
        layers: Layers for `kd_feature`, each as `NAME` or `STUDENT=TEACHER`. If None, the default layers of `source` are used.
        ramp_epochs: Number of epochs over which all weights rise linearly. In the first epoch they are divided by `ramp_epochs`.
            If `ramp_epochs` is 0, the weights are constant.
        off_epochs: Number of epochs without distillation, at the end of the training. The teacher does not run in them.

    Raises:
        RecipeError: The teacher does not match the student, or the maps of two layers have different sizes.
        NumericsError: A loss is not finite or has no effect (see `checks`).
    """

    def __init__(
        self,
        source: Source,
        *,
        feature_weight: float,
        class_weight: float,
        box_weight: float = 0.0,
        iou_weight: float = 0.0,
        temperature: float = 1.0,
        feature_loss: str = "weighted_l2",
        layers: Sequence[str] | None = None,
        ramp_epochs: float = 0.0,
        off_epochs: int = 0,
    ) -> None:
        self.source = source
        self.weights = {
            "kd_feature": feature_weight, "kd_class": class_weight, "kd_box": box_weight, "kd_iou": iou_weight
        }  # fmt: skip
        self.temperature = temperature
        self.feature_loss, self.feature = feature_loss, find_feature_loss(feature_loss)
        self.layers = layers
        self.ramp_epochs, self.off_epochs = ramp_epochs, off_epochs
        self.extras = nn.ModuleDict()
        self.totals: dict[str, Tensor] = {}
        self._taps: list[Taps] = []  # taps of the student, taps of the teacher
        self._scale = 1.0
        self._branch_weights = detect.branch_weights(0, 1)
        self._checked = False

    def __getstate__(self) -> dict[str, object]:
        """Return the state to pickle for the processes of other ranks. A user's own feature loss is replaced by its name."""
        return {**vars(self), "feature": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.feature = find_feature_loss(self.feature_loss)

    # --- the hook ---------------------------------------------------------------------------------------------------

    def on_model(self, model: nn.Module) -> None:
        self.student = model
        self.source.on_model(model)
        if self.weights["kd_feature"]:
            pairs = self.source.pairs(model, self.layers)
            for index, widths in enumerate(matched_widths(model, self.source.net, pairs)):
                self.extras[str(index)] = self.feature.adapter(*widths)
            self._taps = [Taps([mine for mine, _ in pairs]), Taps([yours for _, yours in pairs])]
        self.extras.update(self.source.modules())

    def modules(self) -> nn.ModuleDict:
        return self.extras

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        self.totals = {}
        self._branch_weights = detect.branch_weights(epoch, epochs)
        self.source.start_epoch(epoch, epochs)
        self._scale = min(1.0, (epoch + 1) / self.ramp_epochs) if self.ramp_epochs else 1.0
        if epoch >= epochs - self.off_epochs:
            self._scale = 0.0
        for taps, net in zip(self._taps, (self.student, self.source.net), strict=False):
            taps.attach(net) if self._scale else taps.remove()

    def extra_loss(self, batch: Mapping[str, Any], predictions: Any) -> dict[str, Tensor]:
        if not isinstance(predictions, dict) or not self._scale:  # validation, or an epoch without distillation
            return {}
        outputs = cast(HeadOutputs, predictions)
        teacher_outputs = self.source.outputs(batch["img"], outputs)
        own = self._taps[0].take() if self._taps else []
        terms: dict[str, Tensor] = {}
        if self._taps:
            (seen, *_), (taught, *_) = (list(detect.by_branch(one).values()) for one in (outputs, teacher_outputs))
            levels = _weights_by_level(teacher_weight(taught["scores"].float()), seen["feats"])
            terms["kd_feature"] = self._features(own, self._taps[1].take(), levels)
        with in_float32(batch["img"]):
            terms |= self._head_terms(outputs, teacher_outputs)
        if not self._checked:
            raw = [tensor for one in detect.by_branch(outputs).values() for tensor in (one["scores"], one["boxes"])]
            self._check_first_batch(terms, [*own, *raw], teacher_outputs)
        losses = {name: self.weights[name] * self._scale * term for name, term in terms.items()}
        losses |= self.source.own_loss(batch, outputs, self._head_loss)
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0) + value.detach()
        return losses

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        check_effect(self.totals, epoch)
        return {}

    def on_end(self, model: nn.Module) -> None:
        for taps in self._taps:
            taps.remove()

    # --- the terms --------------------------------------------------------------------------------------------------

    def _features(self, student: Sequence[Tensor], teacher: Sequence[Tensor], levels_B1HW: Sequence[Tensor]) -> Tensor:
        terms = []
        for index, (own, other) in enumerate(zip(student, teacher, strict=True)):
            adapter = self.extras[str(index)]
            for part in adapter.modules():
                if isinstance(part, Aligner):
                    part.start(own, other)
            adapted = adapter(own)
            with in_float32(own):
                terms.append(
                    self.feature.distance(adapted.float(), other.detach().float(), _matching_level(levels_B1HW, other))
                )
        return torch.stack(terms).sum()

    def _head_terms(self, student: HeadOutputs, teacher: HeadOutputs) -> dict[str, Tensor]:
        """Return name -> unweighted loss term between two heads, summed over their branches by the weights of the branches."""
        taught = detect.by_branch(teacher)
        total: dict[str, Tensor] = {}
        for branch, raw in detect.by_branch(student).items():
            for name, term in head_terms(raw, taught[branch], self.weights, self.temperature).items():
                total[name] = total.get(name, 0) + self._branch_weights[branch] * term
        return total

    def _head_loss(self, learner: HeadOutputs, other: HeadOutputs) -> Tensor:
        """Return the weighted sum of `kd_class`, `kd_box` and `kd_iou` between two heads, for the loss of a trained teacher."""
        scores = next(iter(detect.by_branch(learner).values()))["scores"]
        with in_float32(scores):
            terms = self._head_terms(learner, other)
        weighted = [self.weights[name] * self._scale * term for name, term in terms.items()]
        return torch.stack(weighted).sum() if weighted else scores.new_zeros(())

    def _check_first_batch(
        self, terms: Mapping[str, Tensor], student: Sequence[Tensor], teacher_outputs: HeadOutputs
    ) -> None:
        net = self.source.net
        check_terms(terms, student, same=net is not self.student and same_weights(self.student, net))
        self.source.check_outputs(teacher_outputs)
        self._checked = True


def in_float32(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of `like`, in which losses are computed in float32.

    A sum over a feature map of P3 can exceed 65,504, the largest number in float16.
    """
    return torch.autocast(like.device.type, enabled=False)


def _weights_by_level(weight_BA: Tensor, feats: Sequence[Tensor]) -> list[Tensor]:
    """Convert the weights of the anchors to one map (B, 1, H, W) for each level of the head."""
    parts = torch.split(weight_BA, [feat.shape[-2] * feat.shape[-1] for feat in feats], dim=1)
    return [part.view(part.shape[0], 1, *feat.shape[-2:]) for part, feat in zip(parts, feats, strict=True)]


def _matching_level(levels_B1HW: Sequence[Tensor], feat_BCHW: Tensor) -> Tensor:
    """Return the weight map that has the height and width of a feature map.

    If no level has this size (layers with a stride below 8), the map of the nearest level is resized.
    """
    size = feat_BCHW.shape[-2:]
    nearest = min(levels_B1HW, key=lambda level: abs(level.shape[-1] - size[1]))
    return nearest if nearest.shape[-2:] == size else F.interpolate(nearest, size=size, mode="nearest")
