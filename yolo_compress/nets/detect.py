"""Ultralytics' Detect head: its branches, inputs and raw outputs, and how exported files represent the head.

Each level has a box branch (`cv2`) and a class branch (`cv3`). A branch is Conv blocks, some of them depthwise, and a bare convolution.
The head predicts the length of a box side as a distribution over bins. DFL (distribution focal loss) computes the mean of this
distribution. In Ultralytics, DFL is a convolution with the constant weights 0, 1, 2, ... A head without bins (`reg_max` 1) predicts
the lengths themselves.

An end-to-end head (YOLO26) has these branches twice. In training, many anchors of the one-to-many branches (`cv2`, `cv3`) learn each
object, and one anchor of the one-to-one branches (`one2one_cv2`, `one2one_cv3`). The one-to-one outputs need no NMS. The
one-to-many branches only teach the backbone: `deploy` removes them. Pruning keeps their widths, costs leave them out, and INT8 leaves
them in float.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import DFL, Conv, Detect, DWConv

from yolo_compress.errors import RecipeError
from yolo_compress.nets.conv import check_conv, check_conv2d, check_depthwise
from yolo_compress.nets.factors import is_factorised
from yolo_compress.nets.family import Layer
from yolo_compress.nets.flow import FeatureMap, Flow

NAME = Detect.__name__  # in yaml files and in the metadata of exported files
BRANCHES = ("cv2", "cv3")  # boxes, classes
ONE_TO_ONE_BRANCHES = ("one2one_cv2", "one2one_cv3")
ONE_TO_MANY, ONE_TO_ONE = "one2many", "one2one"  # Ultralytics' keys of the raw outputs of an end-to-end head
# Weight of the one-to-many loss in the first and last epoch; both weights add up to 1 (Ultralytics' `E2ELoss`, 8.4.190)
FIRST_ONE_TO_MANY, LAST_ONE_TO_MANY = 0.8, 0.1
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


def is_for_nms(head: nn.Module) -> bool:
    """Return whether a Detect head has one set of branches, whose boxes need NMS."""
    return not is_end_to_end(head)


def needs_nms(model: nn.Module) -> bool:
    """Return whether the boxes of a detector need NMS. Those of an end-to-end head do not."""
    return not any(_end_to_end_heads(model))


def _end_to_end_heads(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Detect) and is_end_to_end(module)]


def box_branches(model: Any) -> list[nn.Sequential]:
    """Return the box branches of all levels. The last convolution of a branch outputs the lengths of box sides, or their bins."""
    head = model.model[-1]
    return [*head.cv2, *(head.one2one_cv2 if is_end_to_end(head) else ())]


def class_branches(model: Any) -> list[nn.Sequential]:
    """Return the class branches of all levels. The last convolution of a branch outputs the class logits."""
    head = model.model[-1]
    return [*head.cv3, *(head.one2one_cv3 if is_end_to_end(head) else ())]


def only_trained(model: nn.Module) -> set[nn.Module]:
    """Return all modules that only training uses: those of the one-to-many branches of an end-to-end head."""
    branches = (getattr(head, name) for head in _end_to_end_heads(model) for name in BRANCHES)
    return {module for branch in branches if branch is not None for module in branch.modules()}


def deploy(model: nn.Module) -> None:
    """Remove what only training uses, in place: the one-to-many branches of an end-to-end head. Other models are not changed.

    The head then returns one tensor, as a head for NMS does when it is exported: boxes as centre, width and height in px, then
    scores, shape (B, 4 + classes, A). Ultralytics' own end-to-end output is the best rows of this tensor.
    """
    for head in _end_to_end_heads(model):
        head.cv2 = head.cv3 = None  # Ultralytics' `fuse` then keeps the one-to-one branches
        head.decode_bboxes = _centre_boxes
        head.forward = partial(_one_to_one, head)


def _centre_boxes(sides_B4A: Tensor, anchors: Tensor, angle: None = None) -> Tensor:
    left_top_B2A, right_bottom_B2A = sides_B4A.chunk(2, 1)
    centre_B2A = anchors + (right_bottom_B2A - left_top_B2A) / 2
    return torch.cat([centre_B2A, left_top_B2A + right_bottom_B2A], 1)


def _one_to_one(head: Any, feats: list[Tensor]) -> Any:
    raw = head.forward_head(feats, **head.one2one)
    return raw if head.training else head._inference(raw)


def fuse(model: Any) -> Any:
    """Prepare a model for inference, in place: `deploy`, and fold BatchNorm into the convolutions, as Ultralytics does. Return it."""
    deploy(model)
    return model.fuse(verbose=False)


def inputs(model: Any) -> list[str]:
    """Return the names of the layers whose feature maps enter the head, one per level."""
    return [f"model.{index}" for index in model.model[-1].f]


def output_layout(model: Any) -> dict[str, object]:
    """Return the properties of the head that must be equal in student and teacher, by name: branches, levels, strides and bins."""
    head = model.model[-1]
    return {
        "branches of the head": "one-to-many and one-to-one" if is_end_to_end(head) else "one-to-many",
        "levels": head.nl,
        "strides": head.stride.tolist(),
        "bins of a box side": head.reg_max,
    }


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


class BranchOutputs(TypedDict):
    """Raw outputs of one set of branches: sides of boxes or their bins, class logits, and the feature maps that the head reads."""

    boxes: Tensor
    scores: Tensor
    feats: NotRequired[list[Tensor]]


class BothOutputs(TypedDict):
    """Raw outputs of an end-to-end head."""

    one2many: BranchOutputs
    one2one: BranchOutputs


HeadOutputs = BranchOutputs | BothOutputs


def by_branch(raw: HeadOutputs) -> dict[str, BranchOutputs]:
    """Return the raw outputs of a head by the name of the branches, each with `boxes`, `scores` and `feats`.

    An end-to-end head has `ONE_TO_MANY` and `ONE_TO_ONE`. The name of the only branches of another head is "".
    """
    if ONE_TO_MANY in raw:
        both = cast(BothOutputs, raw)
        return {ONE_TO_MANY: both["one2many"], ONE_TO_ONE: both["one2one"]}
    return {"": cast(BranchOutputs, raw)}


def branch_weights(epoch: int, epochs: int) -> dict[str, float]:
    """Return the weight of the loss of each branch, by the names of `by_branch`.

    With an end-to-end head, the weight moves from the one-to-many to the one-to-one branches, linearly over the epochs, as
    Ultralytics trains it.

    Args:
        epoch: Number of the epoch, from 0.
        epochs: Number of epochs.
    """
    left = max(1 - epoch / max(epochs - 1, 1), 0)
    many = left * (FIRST_ONE_TO_MANY - LAST_ONE_TO_MANY) + LAST_ONE_TO_MANY
    return {"": 1.0, ONE_TO_MANY: many, ONE_TO_ONE: max(1.0 - many, 0)}


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
    """Prepare the head for export, in place: it returns one tensor and computes DFL, if it has bins, as `Expectation`.

    Args:
        model: Copy of the model to export, after `fuse`. The head of this copy is changed.
        kind: Ultralytics' name of the file format: "onnx" or "torchscript".
    """
    head = model.model[-1]
    if head.reg_max > 1:
        head.dfl = Expectation(head.reg_max)
    # the same settings as in ultralytics/engine/exporter.py (8.4.190)
    head.export, head.format, head.dynamic, head.shape = True, kind, False, None


def exported_prefix(conv: str) -> str | None:
    """Return the common name prefix of the ONNX nodes that replace the DFL convolution.

    If `conv` is the name of any other convolution, return None.
    """
    return f"/{conv.removesuffix('.dfl.conv')}/dfl/" if conv.endswith(".dfl.conv") else None


def _check(name: str, head: Any) -> None:
    end_to_end = is_end_to_end(head)
    expected = nn.Identity if end_to_end else DFL
    if type(head.dfl) is not expected:
        bins = "Identity (reg_max = 1) in an end-to-end head" if end_to_end else "DFL (reg_max > 1)"
        raise RecipeError(f"prune: {name}.dfl is a {type(head.dfl).__name__}, expected {bins}")
    for branch in (*BRANCHES, *(ONE_TO_ONE_BRANCHES if end_to_end else ())):
        levels = getattr(head, branch, None)
        if levels is None:
            raise RecipeError(f"prune: {name} has no {branch} (a fused model); give the checkpoint as it was trained")
        for i, convs in enumerate(levels):
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
    end_to_end = is_end_to_end(head)
    if end_to_end and head.cv2 is not None:
        with flow.only_trained():
            _wire_branches(flow, name, head, BRANCHES, sources)
    _wire_branches(flow, name, head, ONE_TO_ONE_BRANCHES if end_to_end else BRANCHES, sources)
    if isinstance(head.dfl, nn.Module) and not isinstance(head.dfl, nn.Identity):
        flow.output(f"{name}.dfl.conv", None, DFL_CONV)
    return FeatureMap(name, ())


def _wire_branches(flow: Flow, name: str, head: Any, branches: tuple[str, ...], sources: list[FeatureMap]) -> None:
    for branch in branches:
        for level, source in enumerate(sources):
            _wire_branch(flow, f"{name}.{branch}.{level}", getattr(head, branch)[level], source)


def _wire_branch(flow: Flow, name: str, layers: nn.Sequential, source: FeatureMap) -> FeatureMap:
    for child, layer in layers.named_children():
        inner = f"{name}.{child}"
        if isinstance(layer, nn.Sequential) and not is_factorised(layer):
            source = _wire_branch(flow, inner, layer, source)
        elif isinstance(layer, Conv | nn.Sequential):
            source = flow.conv(inner, source)
        elif isinstance(layer, nn.Conv2d):
            flow.output(inner, source, OUTPUT_CONV)
        else:
            raise RecipeError(f"{inner} is a {type(layer).__name__}, expected Conv or Conv2d in a branch of the head")
    return source


DETECT = Layer(_check, _wire)
