"""Ultralytics' Detect head: its branches, inputs and raw outputs, and how exported files represent the head.

Each level has a box branch (`cv2`) and a class branch (`cv3`). A branch is Conv blocks, some of them depthwise, and a bare convolution.
The head predicts the length of a box side as a distribution over bins. DFL (distribution focal loss) computes the mean of this
distribution. In Ultralytics, DFL is a convolution with the constant weights 0, 1, 2, ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import DFL, Conv, Detect, DWConv

from yolo_compress.errors import RecipeError
from yolo_compress.nets.conv import check_conv, check_conv2d, check_depthwise
from yolo_compress.nets.family import Layer
from yolo_compress.nets.flow import FeatureMap, Flow

NAME = Detect.__name__  # in yaml files and in the metadata of exported files
BRANCHES = ("cv2", "cv3")  # boxes, classes
OUTPUT_CONV = "output convolution of the head: boxes and logits keep float resolution"
DFL_CONV = "DFL: the expectation over bins of the box decode"


def is_detect(head: nn.Module) -> bool:
    """Return whether `head` is exactly Detect, the head of a plain detector."""
    return type(head) is Detect


def extends_detect(head: nn.Module) -> bool:
    """Return whether `head` is a subclass of Detect for another task, such as Segment."""
    return isinstance(head, Detect) and type(head) is not Detect


def is_end_to_end(head: nn.Module) -> bool:
    """Return whether a Detect head predicts without NMS, with branches of its own, as in YOLO26."""
    return getattr(head, "one2one_cv2", None) is not None


def box_branches(model: Any) -> list[nn.Sequential]:
    """Return the box branch of each level. The last convolution of a branch outputs the logits of the bins."""
    return list(model.model[-1].cv2)


def class_branches(model: Any) -> list[nn.Sequential]:
    """Return the class branch of each level. The last convolution of a branch outputs the class logits."""
    return list(model.model[-1].cv3)


def inputs(model: Any) -> list[str]:
    """Return the names of the layers whose feature maps enter the head, one per level."""
    return [f"model.{index}" for index in model.model[-1].f]


def output_layout(model: Any) -> dict[str, object]:
    """Return the properties of the head that must be equal in student and teacher, by name: levels, strides and bins."""
    head = model.model[-1]
    return {"levels": head.nl, "strides": head.stride.tolist(), "bins of a box side": head.reg_max}


def constants(model: nn.Module) -> set[str]:
    """Return the names of the convolutions that DFL consists of. Their weights are constants and are never trained."""
    return {f"{name}.conv" for name, module in model.named_modules() if isinstance(module, DFL)}


def freeze_constants(model: Any) -> None:
    """Exclude the constant weights of DFL from training, in place."""
    model.model[-1].dfl.requires_grad_(False)


def return_raw_outputs(model: Any) -> None:
    """Make the head return raw outputs instead of decoded boxes, in place. The head then stores no anchors either.

    Only the training flag of the head itself changes. Its BatchNorms keep their mode.
    """
    model.model[-1].training = True


def raw_outputs(model: Any, images_BCHW: Tensor) -> list[Tensor]:
    """Run the model and return the raw outputs of the head: logits of the box bins and of the classes, before decoding.

    The function calls `return_raw_outputs`, so the head of `model` changes.
    """
    return_raw_outputs(model)
    raw = model(images_BCHW)
    return [raw["boxes"], raw["scores"]]


class Expectation(nn.Module):
    """DFL computed as a quotient of two sums of exponentials.

    The result is the expectation of a softmax over `reg_max` bins, the same value as in Ultralytics. Ultralytics applies a
    convolution to the softmax. In ONNX Runtime this convolution is many times slower than the quotient (`benchmarks/dfl.py`), and
    pruning does not make it faster.
    """

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.stack([torch.arange(reg_max, dtype=torch.float32), torch.ones(reg_max)]))

    def forward(self, sides_BNA: Tensor) -> Tensor:
        """Return the lengths of the box sides in units of the stride, shape (B, 4, A) with A anchors.

        Args:
            sides_BNA: Logits of the bins, with N = 4 * reg_max.
        """
        batch, channels, anchors = sides_BNA.shape
        bins = sides_BNA.view(batch, 4, channels // 4, anchors)
        weighted = self.sums @ (bins - bins.amax(2, keepdim=True)).exp()
        return weighted[:, :, 0] / weighted[:, :, 1]


def for_export(model: Any, kind: str) -> None:
    """Prepare the head for export, in place: it returns one tensor and computes DFL as `Expectation`.

    Args:
        model: Copy of the model to export. The head of this copy is changed.
        kind: Ultralytics' name of the file format: "onnx" or "torchscript".
    """
    head = model.model[-1]
    head.dfl = Expectation(head.reg_max)
    # the same settings as in ultralytics/engine/exporter.py (8.4.190)
    head.export, head.format, head.dynamic, head.shape = True, kind, False, None


def exported_prefix(conv: str) -> str | None:
    """Return the common name prefix of the ONNX nodes that replace the DFL convolution.

    If `conv` is the name of any other convolution, return None.
    """
    return f"/{conv.removesuffix('.dfl.conv')}/dfl/" if conv.endswith(".dfl.conv") else None


def _check(name: str, head: Any) -> None:
    if is_end_to_end(head):
        raise RecipeError(f"prune: {name} is an end-to-end head (one2one branches), expected a head without them")
    if type(head.dfl) is not DFL:
        raise RecipeError(f"prune: {name}.dfl is a {type(head.dfl).__name__}, expected DFL (reg_max > 1)")
    for branch in BRANCHES:
        for i, convs in enumerate(getattr(head, branch)):
            _check_branch(f"{name}.{branch}.{i}", convs)


def _check_branch(name: str, layers: nn.Sequential) -> None:
    for index, layer in enumerate(layers):
        inner = f"{name}.{index}"
        if isinstance(layer, nn.Sequential):
            _check_branch(inner, layer)
        elif isinstance(layer, nn.Conv2d):
            check_conv2d(inner, layer)
        else:
            (check_depthwise if isinstance(layer, DWConv) else check_conv)(inner, layer)


def _wire(flow: Flow, name: str, head: Any, sources: list[FeatureMap]) -> FeatureMap:
    for branch in BRANCHES:
        for level, source in enumerate(sources):
            _wire_branch(flow, f"{name}.{branch}.{level}", getattr(head, branch)[level], source)
    if isinstance(head.dfl, nn.Module) and not isinstance(head.dfl, nn.Identity):
        flow.output(f"{name}.dfl.conv", None, DFL_CONV)
    return FeatureMap(name, ())


def _wire_branch(flow: Flow, name: str, layers: nn.Sequential, source: FeatureMap) -> FeatureMap:
    for index, layer in enumerate(layers):
        inner = f"{name}.{index}"
        if isinstance(layer, nn.Sequential):
            source = _wire_branch(flow, inner, layer, source)
        elif isinstance(layer, Conv):
            source = flow.conv(inner, source)
        elif isinstance(layer, nn.Conv2d):
            flow.output(inner, source, OUTPUT_CONV)
        else:
            raise RecipeError(f"{inner} is a {type(layer).__name__}, expected Conv or Conv2d in a branch of the head")
    return source


DETECT = Layer(_check, _wire)
