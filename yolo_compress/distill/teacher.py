"""Whom a student learns from: a frozen net, a peer that learns along, or its own deeper layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.distill.checks import prove_frozen, same_weights
from yolo_compress.distill.taps import split_pairs
from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.families import family_of

Pull = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]  # (learner's, other's) head outputs -> loss


class Source(ABC):
    """What `Teach` asks of a teacher.

    Attributes:
        net: The net whose layers are tapped; set after `on_model`.
    """

    net: nn.Module

    @abstractmethod
    def on_model(self, student: nn.Module) -> None:
        """Sees the student once, on its device.

        Raises:
            RecipeError: This source cannot teach it.
        """

    @abstractmethod
    def outputs(self, images_BCHW: Tensor, predictions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Raw outputs of the head, `scores` and `boxes`, without gradient; `predictions` are the student's."""

    def pairs(self, student: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, str]]:
        """(student's, own) layers that are compared; where none are named, the maps that enter the head."""
        return (
            split_pairs(layers) if layers else list(zip(detect.inputs(student), detect.inputs(self.net), strict=True))
        )

    def prove(self, outputs: Mapping[str, Tensor]) -> None:
        """Asserts of a batch that what teaches takes no gradient."""
        if learning := [name for name in ("scores", "boxes") if outputs[name].requires_grad]:
            raise AssertionError(f"the teacher's {' and '.join(learning)} carry a gradient")

    def modules(self) -> dict[str, nn.Module]:
        """What is trained along."""
        return {}

    def own_loss(self, batch: Mapping[str, Any], predictions: Mapping[str, Tensor], pull: Pull) -> dict[str, Tensor]:
        """What trains `modules()`, named; called after `outputs` of the same batch."""
        return {}


class Frozen(Source):
    """A net that stays as it is (arXiv 1503.02531).

    It sees the very batch of the student, under `no_grad` (not `inference_mode`, whose tensors cannot enter a loss), in
    evaluation mode, so its BatchNorm stays. Where mixed precision is on, its convolutions are kept in it too: half of the
    memory, and nothing to cast in each step. It runs channels last, which is faster
    (`benchmarks/distillation.py steps`), unless it starts as the student's equal: then both round alike, and every term is 0.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)
        detect.return_raw_outputs(self.net)
        self._halved = False

    def on_model(self, student: nn.Module) -> None:
        check_pair(student, self.net)
        self.net.to(next(student.parameters()).device)
        if not same_weights(student, self.net):
            self.net.to(memory_format=torch.channels_last)

    def outputs(self, images_BCHW: Tensor, predictions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        device = images_BCHW.device.type
        if not self._halved and torch.is_autocast_enabled(device):
            for module in self.net.modules():  # BatchNorm stays in float32, as autocast wants it
                if isinstance(module, nn.Conv2d):
                    module.to(torch.get_autocast_dtype(device))
            self._halved = True
        with torch.no_grad():
            return self.net(images_BCHW)  # type: ignore[no-any-return]

    def prove(self, outputs: Mapping[str, Tensor]) -> None:
        super().prove(outputs)
        prove_frozen(self.net)


class Peer(Source):
    """A second student: each learns from the labels and from the other (Deep Mutual Learning, arXiv 1706.00384).

    It is trained by the student's optimizer at the rate `lr0` without weight decay, resumed, and never in a checkpoint. Its
    loss, `peer`, is its own detection loss and the head terms with the student as teacher.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.requires_grad_(True)
        detect.freeze_constants(self.net)

    def on_model(self, student: nn.Module) -> None:
        check_pair(student, self.net)
        self.net.to(next(student.parameters()).device).train()
        self.net.args = student.args
        self._criterion = self.net.init_criterion()  # type: ignore[operator]
        self._predictions: Mapping[str, Tensor] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"peer": self.net}

    def outputs(self, images_BCHW: Tensor, predictions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._predictions = self.net(images_BCHW)
        return _detached(self._predictions)

    def own_loss(self, batch: Mapping[str, Any], predictions: Mapping[str, Tensor], pull: Pull) -> dict[str, Tensor]:
        seen, self._predictions = self._predictions, {}
        labels = self._criterion(seen, batch)[0].sum() / batch["img"].shape[0]
        return {"peer": labels + pull(seen, _detached(predictions))}


class Own(Source):
    """The student itself: its deep layers teach its shallow ones (self-distillation, after arXiv 1905.08094).

    The maps that enter the head teach those of the backbone at the same stride; a head has no deeper one, so there are
    no head terms.
    """

    def on_model(self, student: nn.Module) -> None:
        self.net = student

    def pairs(self, student: nn.Module, layers: Sequence[str] | None) -> list[tuple[str, str]]:
        chosen = split_pairs(layers or family_of(student, "distill").deep_to_shallow)
        if alone := [shallow for shallow, deep in chosen if shallow == deep]:
            raise RecipeError(f"distill.layers: {alone[0]} cannot teach itself; give SHALLOW=DEEP")
        return chosen

    def outputs(self, images_BCHW: Tensor, predictions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _detached(predictions)


def _detached(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: outputs[name].detach() for name in ("scores", "boxes")}


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raises RecipeError when a teacher cannot teach this student; names what differs."""
    own, other = (
        {"classes": list(model.names.values()), **detect.output_layout(model)}  # type: ignore[union-attr,operator]
        for model in (student, teacher)
    )
    for what, mine in own.items():
        if mine != other[what]:
            raise RecipeError(f"teacher and student differ in {what}: student {mine}, teacher {other[what]}")
