"""Taps: forward hooks that read the outputs of named layers of a model during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect, families
from yolo_compress.nets.eval_mode import evaluating

PROBE_CELLS = 2  # side of the probe image in cells of the coarsest level


class Taps:
    """Forward hooks that store the outputs of the layers `names` in each forward pass of a model.

    Call `attach` only when training starts. Otherwise a copy of the model, such as the EMA, would also have the hooks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._outputs: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, net: nn.Module) -> None:
        """Register the forward hooks on the model `net`. A second call does nothing."""
        if not self._handles:
            modules = dict(net.named_modules())
            self._handles = [modules[name].register_forward_hook(self._make_hook(name)) for name in self.names]

    def _make_hook(self, name: str) -> Any:
        def save_output(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[name] = output

        return save_output

    def take(self) -> list[Tensor]:
        """Return the outputs of the layers in the last forward pass, in the order of `names`, and release them."""
        outputs, self._outputs = self._outputs, {}
        return [outputs[name] for name in self.names]

    def remove(self) -> None:
        """Remove the hooks and release all stored outputs."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._outputs = [], {}


def split_pairs(layers: Sequence[str]) -> list[tuple[str, str]]:
    """Return (student's layer, teacher's layer) for each of `layers`, which are written as `model.15` or `model.18=model.21`."""
    return [(student, teacher or student) for student, _, teacher in (layer.partition("=") for layer in layers)]


def map_shapes(net: nn.Module, names: Sequence[str], role: str) -> list[tuple[int, int, int]]:
    """Return the shape (C, H, W) of the feature map of each layer, for a square black image.

    The side of the image is `PROBE_CELLS` times the largest stride.

    Args:
        net: Stock detector. It is not changed.
        names: Module names of the layers.
        role: "student" or "teacher", for errors.

    Raises:
        RecipeError: A layer does not exist, or its output is not a feature map.
    """
    known = dict(net.named_modules())
    for name in names:
        if name not in known:
            last = len(net.model) - 1  # type: ignore[arg-type]
            raise RecipeError(
                f"distill.layers: the {role} has no layer {name!r}; its layers are model.0 to model.{last}"
            )
    like = next(net.parameters())
    channels = next(module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d))
    side = PROBE_CELLS * int(net.stride.max())  # type: ignore[operator,union-attr]
    taps = Taps(names)
    with evaluating(net), torch.no_grad():
        detect.return_raw_outputs(net)  # so that it does not store anchors for this image size
        taps.attach(net)
        try:
            net(torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype))
            maps = taps.take()
        finally:
            taps.remove()
    for name, feat in zip(names, maps, strict=True):
        if not isinstance(feat, Tensor) or feat.dim() != 4:
            raise RecipeError(
                f"distill.layers: the output of {name} of the {role} ({type(known[name]).__name__}) is not a feature map; "
                "set another layer"
            )
    return [(feat.shape[1], feat.shape[2], feat.shape[3]) for feat in maps]


def shallow_to_deep(net: nn.Module) -> list[tuple[str, str]]:
    """Return (layer of the backbone, input of the head) for each input of the head. Both have the same stride.

    Of several layers of the backbone with this stride, the last is taken.
    """
    shallow, deep = families.backbone(net), detect.inputs(net)
    sizes = [(height, width) for _, height, width in map_shapes(net, [*shallow, *deep], "student")]
    last = dict(zip(sizes, shallow, strict=False))
    return [(last[size], name) for size, name in zip(sizes[len(shallow) :], deep, strict=True)]


def matched_widths(student: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return (student's number of channels, teacher's number of channels) for each pair of layers.

    Raises:
        RecipeError: A layer does not exist, or the two feature maps of a pair differ in height or width.
    """
    own = map_shapes(student, [name for name, _ in pairs], "student")
    other = map_shapes(teacher, [name for _, name in pairs], "teacher")
    side = PROBE_CELLS * int(student.stride.max())  # type: ignore[operator,union-attr]
    for (mine, yours), (_, *size), (_, *wanted) in zip(pairs, own, other, strict=True):
        if size != wanted:
            raise RecipeError(
                f"distill.layers: {mine} of the student is {size[0]} x {size[1]}, {yours} of the teacher {wanted[0]} x "
                f"{wanted[1]} on {side} px; pair layers of the same stride"
            )
    return [(mine[0], yours[0]) for mine, yours in zip(own, other, strict=True)]
