"""Ultralytics' Detect head: its branches, its inputs, its raw outputs and its form in exported files.

Each of the levels has a box branch (`cv2`) and a class branch (`cv3`), two Conv blocks and a bare convolution. DFL, a convolution
with the constant weights 0, 1, 2, ..., turns the distribution over bins of a box side into its length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import DFL, Conv, Detect

from yolo_compress.errors import RecipeError
from yolo_compress.nets.conv import check_conv, check_conv2d
from yolo_compress.nets.family import Layer
from yolo_compress.nets.flow import Flow

NAME = Detect.__name__  # in yaml files and in the metadata of exported files
BRANCHES = ("cv2", "cv3")  # boxes, classes
OUTPUT_CONV = "output convolution of the head: boxes and logits keep float resolution"
DFL_CONV = "DFL: the expectation over bins of the box decode"


def is_detect(head: nn.Module) -> bool:
    """Whether it is the head of a plain detector."""
    return type(head) is Detect


def extends_detect(head: nn.Module) -> bool:
    """Whether it is the head of another task, such as Segment, which has the branches of Detect and more."""
    return isinstance(head, Detect) and type(head) is not Detect


def box_branches(model: Any) -> list[nn.Sequential]:
    """The box branch of each level; the last convolution gives the bins."""
    return list(model.model[-1].cv2)


def class_branches(model: Any) -> list[nn.Sequential]:
    """The class branch of each level; the last convolution gives the class logits."""
    return list(model.model[-1].cv3)


def inputs(model: Any) -> list[str]:
    """Names of the layers whose maps enter the head, a level each."""
    return [f"model.{index}" for index in model.model[-1].f]


def outputs(model: Any) -> list[str]:
    """Names of the convolutions whose channels are the model's outputs (boxes, class scores, DFL)."""
    name, head = f"model.{len(model.model) - 1}", model.model[-1]
    return [*(f"{name}.{branch}.{i}.2" for branch in BRANCHES for i in range(head.nl)), f"{name}.dfl.conv"]


def facts(model: Any) -> dict[str, object]:
    """What two heads must have in common so that one can teach the other."""
    head = model.model[-1]
    return {"levels": head.nl, "strides": head.stride.tolist(), "bins of a box side": head.reg_max}


def constants(model: nn.Module) -> set[str]:
    """Names of the convolutions whose weights are constants: DFL's."""
    return {f"{name}.conv" for name, module in model.named_modules() if isinstance(module, DFL)}


def freeze_constants(model: Any) -> None:
    """Take the constant weights out of training, in place."""
    model.model[-1].dfl.requires_grad_(False)


def give_raw(model: Any) -> None:
    """Make the head return raw outputs instead of decoding boxes, in place; it then remembers no anchors of an image.

    This sets the training flag of the head alone: its BatchNorms stay in their mode.
    """
    model.model[-1].training = True


def raw_outputs(model: Any, images_BCHW: Tensor) -> list[Tensor]:
    """Bins of the box sides and class logits, before decoding. Leaves the head as `give_raw` does."""
    give_raw(model)
    raw = model(images_BCHW)
    return [raw["boxes"], raw["scores"]]


class Expectation(nn.Module):
    """Ultralytics' DFL, the expectation of a softmax over `reg_max` bins, as two sums over one exponential.

    Same function as its convolution of the softmax, which ONNX Runtime runs many times slower (`benchmarks/dfl.py`):
    a fixed cost that no pruning takes away.
    """

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.stack([torch.arange(reg_max, dtype=torch.float32), torch.ones(reg_max)]))

    def forward(self, sides_BNA: Tensor) -> Tensor:
        """sides_B(4*reg_max)A to sides_B4A, in strides."""
        batch, channels, anchors = sides_BNA.shape
        bins = sides_BNA.view(batch, 4, channels // 4, anchors)
        weighted = self.sums @ (bins - bins.amax(2, keepdim=True)).exp()
        return weighted[:, :, 0] / weighted[:, :, 1]


def for_export(model: Any, kind: str) -> None:
    """Make the head of a copy return one tensor and compute DFL as `Expectation`, in place.

    Args:
        model: The copy.
        kind: Ultralytics' word for the file: "onnx" or "torchscript".
    """
    head = model.model[-1]
    head.dfl = Expectation(head.reg_max)
    # as ultralytics/engine/exporter.py (8.4.190) sets a detector up
    head.export, head.format, head.dynamic, head.shape = True, kind, False, None


def exported_place(conv: str) -> str | None:
    """The start of the names of the nodes that stand for a convolution which is exported as others: DFL's. None for others."""
    return f"/{conv.removesuffix('.dfl.conv')}/dfl/" if conv.endswith(".dfl.conv") else None


def _check(name: str, head: Any) -> None:
    if getattr(head, "one2one_cv2", None) is not None or head.cv2 is None:
        raise RecipeError(f"prune: {name} is an end-to-end head (one2one branches), expected a head without them")
    if type(head.dfl) is not DFL:
        raise RecipeError(f"prune: {name}.dfl is a {type(head.dfl).__name__}, expected DFL (reg_max > 1)")
    for branch in BRANCHES:
        for i, convs in enumerate(getattr(head, branch)):
            check_conv(f"{name}.{branch}.{i}.0", convs[0])
            check_conv(f"{name}.{branch}.{i}.1", convs[1])
            check_conv2d(f"{name}.{branch}.{i}.2", convs[2])


def _wire(flow: Flow, name: str, head: Any, sources: list[str]) -> str:
    for branch in BRANCHES:
        for level, source in enumerate(sources):
            _wire_branch(flow, f"{name}.{branch}.{level}", getattr(head, branch)[level], source)
    if isinstance(head.dfl, nn.Module) and not isinstance(head.dfl, nn.Identity):
        flow.output(f"{name}.dfl.conv", "", DFL_CONV)
    return name


def _wire_branch(flow: Flow, name: str, layers: nn.Sequential, source: str) -> None:
    for index, layer in enumerate(layers):
        inner = f"{name}.{index}"
        if isinstance(layer, Conv):
            source = flow.conv(inner, source)
        elif isinstance(layer, nn.Conv2d):
            flow.output(inner, source, OUTPUT_CONV)
        else:
            raise RecipeError(
                f"quantise: {inner} is a {type(layer).__name__}, expected Conv or Conv2d in a branch of the head"
            )


DETECT = Layer(_check, _wire)
