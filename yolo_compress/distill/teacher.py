"""Teachers for distillation: a frozen model, a model that is trained together with the student, or the student's deeper layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from yolo_compress.distill.checks import check_frozen, same_weights
from yolo_compress.distill.taps import shallow_to_deep, split_pairs
from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.detect import HeadOutputs

# (outputs of a head, outputs of the other head) -> loss
HeadLoss = Callable[[HeadOutputs, HeadOutputs], Tensor]


class Source(ABC):
    """Base class of teachers for the hook `Teach`.

    Attributes:
        net: the model from which `kd_feature` reads layers. `on_model` sets this attribute.
    """

    net: nn.Module

    @abstractmethod
    def on_model(self, student: nn.Module) -> None:
        """Prepare the teacher for a student. Called once, after the student is on its device.

        Raises:
            RecipeError: This teacher does not match the student.
        """

    @abstractmethod
    def outputs(self, images_BCHW: Tensor, predictions: HeadOutputs) -> HeadOutputs:
        """Return the raw outputs of the teacher's head (see `detect.by_branch`), without gradient.

        Args:
            predictions: The student's outputs for the same images.
        """

    def pairs(self, student: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, str]]:
        """Return (student's layer, teacher's layer) for each comparison. If `layers` is None, the inputs of both heads are compared."""
        return (
            split_pairs(layers) if layers else list(zip(detect.inputs(student), detect.inputs(self.net), strict=True))
        )

    def check_outputs(self, outputs: HeadOutputs) -> None:
        """Assert that the teacher's outputs have no gradient."""
        for raw in detect.by_branch(outputs).values():
            tensors = {"scores": raw["scores"], "boxes": raw["boxes"]}
            if trainable := [name for name, tensor in tensors.items() if tensor.requires_grad]:
                raise AssertionError(f"the teacher's {' and '.join(trainable)} carry a gradient")

    def modules(self) -> dict[str, nn.Module]:
        """Return name -> module for all modules of the teacher that are trained with the student."""
        return {}

    def start_epoch(self, epoch: int, epochs: int) -> None:  # noqa: B027  a teacher that is not trained has nothing to do
        """Prepare for an epoch, counted from 0."""

    def own_loss(self, batch: Mapping[str, Any], predictions: HeadOutputs, head_loss: HeadLoss) -> dict[str, Tensor]:
        """Return name -> loss for the training of `modules()`. Called after `outputs`, with the same batch."""
        return {}


class Frozen(Source):
    """A teacher with fixed weights (arXiv 1503.02531).

    The teacher gets the same batches as the student. It is in evaluation mode, so its BatchNorm statistics do not change. It runs
    under `no_grad`, since tensors of `inference_mode` cannot be used in a loss.

    With mixed precision, the teacher's convolutions are stored in half precision. This halves their memory and avoids casts in each
    step. The teacher's memory format is channels last, which is faster (`benchmarks/distillation.py steps`). If teacher and student
    have equal weights, the teacher has the student's memory format. Both then round alike, so all loss terms are exactly 0.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)
        detect.return_raw_outputs(self.net)
        self._cast = False

    def on_model(self, student: nn.Module) -> None:
        check_pair(student, self.net)
        self.net.to(next(student.parameters()).device)
        if not same_weights(student, self.net):
            self.net.to(memory_format=torch.channels_last)

    def outputs(self, images_BCHW: Tensor, predictions: HeadOutputs) -> HeadOutputs:
        device = images_BCHW.device.type
        if not self._cast and torch.is_autocast_enabled(device):
            for module in self.net.modules():  # BatchNorm stays float32, as in autocast
                if isinstance(module, nn.Conv2d):
                    module.to(torch.get_autocast_dtype(device))
            self._cast = True
        with torch.no_grad():
            return self.net(images_BCHW)  # type: ignore[no-any-return]

    def check_outputs(self, outputs: HeadOutputs) -> None:
        super().check_outputs(outputs)
        check_frozen(self.net)


class Peer(Source):
    """A second student. Both students learn from the labels and from each other (Deep Mutual Learning, arXiv 1706.00384).

    The student's optimizer trains the second student, at the learning rate `lr0` without weight decay. A resumed run restores the
    second student, but checkpoints do not contain it. Its loss `peer` is its detection loss plus `kd_class`, `kd_box` and `kd_iou`
    with the first student as teacher.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.requires_grad_(True)
        detect.freeze_constants(self.net)

    def on_model(self, student: nn.Module) -> None:
        check_pair(student, self.net)
        self.net.to(next(student.parameters()).device).train()
        self.net.args = student.args
        self._criterion = self.net.init_criterion()  # type: ignore[operator]
        self._predictions: HeadOutputs | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"peer": self.net}

    def outputs(self, images_BCHW: Tensor, predictions: HeadOutputs) -> HeadOutputs:
        predicted: HeadOutputs = self.net(images_BCHW)
        self._predictions = predicted
        return _detached(predicted)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        if detect.is_end_to_end(self.net.model[-1]):  # type: ignore[index]
            weights = detect.branch_weights(epoch, epochs)
            self._criterion.o2m, self._criterion.o2o = weights[detect.ONE_TO_MANY], weights[detect.ONE_TO_ONE]

    def own_loss(self, batch: Mapping[str, Any], predictions: HeadOutputs, head_loss: HeadLoss) -> dict[str, Tensor]:
        seen, self._predictions = self._predictions, None
        assert seen is not None, "`outputs` is called first"
        labels = self._criterion(seen, batch)[0].sum() / batch["img"].shape[0]
        return {"peer": labels + head_loss(seen, _detached(predictions))}


class Own(Source):
    """The student as its own teacher: deep layers teach shallow ones (self-distillation, after arXiv 1905.08094).

    The feature maps that enter the head teach the maps of the backbone with the same stride. `kd_class`, `kd_box` and `kd_iou` are
    not available, since the model has only one head.
    """

    def on_model(self, student: nn.Module) -> None:
        self.net = student

    def pairs(self, student: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, str]]:
        chosen = split_pairs(layers) if layers else shallow_to_deep(student)
        if alone := [shallow for shallow, deep in chosen if shallow == deep]:
            raise RecipeError(f"distill.layers: {alone[0]} cannot teach itself; write SHALLOW=DEEP")
        return chosen

    def outputs(self, images_BCHW: Tensor, predictions: HeadOutputs) -> HeadOutputs:
        return _detached(predictions)


def _detached(outputs: HeadOutputs) -> HeadOutputs:
    found = {
        branch: {"boxes": raw["boxes"].detach(), "scores": raw["scores"].detach()}
        for branch, raw in detect.by_branch(outputs).items()
    }
    return cast(HeadOutputs, found.get("", found))


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Check that teacher and student have the same class names and the same layout of the head's outputs.

    Raises:
        RecipeError: Class names, branches of the head, levels, strides or numbers of bins per box side differ.
    """
    own, other = (
        {"classes": list(model.names.values()), **detect.output_layout(model)}  # type: ignore[union-attr,operator]
        for model in (student, teacher)
    )
    for what, mine in own.items():
        if mine != other[what]:
            raise RecipeError(f"teacher and student differ in {what}: student {mine}, teacher {other[what]}")
